"""`w2vscale data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar

from w2vscale.cli.arguments import Channel, channel_number
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import UserError, counted

if TYPE_CHECKING:
    from w2vscale.config import Config
    from w2vscale.corpora.manifests import PreparedManifest
    from w2vscale.corpora.report import Report
    from w2vscale.corpora.stats import CorpusStats

app = typer.Typer(no_args_is_help=True, help="Prepare, index and check corpora.")
prepare_app = typer.Typer(no_args_is_help=True, help="Write Lhotse cut manifests of a corpus.")
app.add_typer(prepare_app, name="prepare")

Manifests = Annotated[list[Path], typer.Argument(metavar="CUTS.jsonl...", help="Lhotse cut manifests.")]
IndexedManifest = Annotated[Path, typer.Argument(metavar="CUTS.jsonl", help="An indexed Lhotse cut manifest.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of parallel processes.")]
Corpus = Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder of the corpus.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the manifests.")]
Encoding = Annotated[
    str | None, typer.Option(metavar="NAME", help="Encoding of the transcripts, e.g. latin-1.", show_default="Unicode")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop if a file cannot be used.")]
MaxBadFraction = Annotated[
    float,
    typer.Option(metavar="FRACTION", min=0.0, max=1.0, help="Stop if more of the files cannot be used (at least 11)."),
]
Parts = Annotated[
    list[str] | None,
    typer.Option(
        "--part", metavar="PART", help="Prepare only this part, e.g. train-clean-100; repeatable.", show_default="all"
    ),
]


@prepare_app.command()
def librispeech(corpus: Corpus, output: Output, part: Parts = None, jobs: Jobs = 1) -> None:
    """Prepare LibriSpeech: write OUT/cuts_PART.jsonl for each part."""
    from w2vscale.corpora.librispeech import prepare_librispeech

    _show_written(prepare_librispeech(corpus, output, parts=part, jobs=jobs))


@prepare_app.command("mini_librispeech")
def mini_librispeech(corpus: Corpus, output: Output, part: Parts = None, jobs: Jobs = 1) -> None:
    """Prepare mini LibriSpeech: train-clean-5 and dev-clean-2."""
    from w2vscale.corpora.librispeech import prepare_librispeech

    _show_written(prepare_librispeech(corpus, output, parts=part, jobs=jobs, mini=True))


@prepare_app.command()
def folder(
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="Folder of audio files at any depth.")],
    output: Output,
    segment_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Split longer recordings into segments of at most this duration, in seconds.",
            show_default="30 with --vad",
        ),
    ] = None,
    vad: Annotated[
        bool, typer.Option("--vad", help="Cut recordings at pauses, and leave pauses out, with Silero VAD.")
    ] = False,
    channel: Channel = "mean",
    validation_share: Annotated[
        float, typer.Option(help="Put this fraction of the recordings, from 0 to 1, into cuts_validation.jsonl.")
    ] = 0.0,
    encoding: Encoding = None,
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare any folder of audio files.

    A file of the same name beside an audio file is its transcript: .txt, or with times .ctm, .TextGrid, .srt, .vtt or
    .json. What is not used is listed in OUT/prepare_report.json.
    """
    from w2vscale.corpora.folder import prepare_folder
    from w2vscale.corpora.preparing import Options

    with progress_bar("looking for speech" if vad else "reading headers") as progress:
        report = prepare_folder(
            audio,
            output,
            segment_seconds=segment_seconds,
            validation_share=validation_share,
            encoding=encoding,
            options=Options(channel_number(channel), vad, strict, max_bad_fraction, jobs, progress),
        )
    _show_report(report, output)


def _show_written(written: list[PreparedManifest]) -> None:
    for one in written:
        console.print(f"{one.path}: {counted(one.utterances, 'utterance')}, {one.hours:.2f} hours")


def _show_report(report: Report, output: Path) -> None:
    """Show what was written, and what became of each file if not all were used."""
    _show_written(report.manifests)
    if report.headers_unchanged:
        read = counted(report.headers_read, "audio file")
        console.print(f"headers: {read} read, {report.headers_unchanged:,} unchanged since an earlier call")
    if report.seconds:
        hours, speech = report.seconds / 3600, report.seconds_of_speech / 3600
        console.print(f"speech: {speech:.2f} of {hours:.2f} hours ({speech / hours:.1%})")
    for note, count in (+report.notes).items():
        console.print(f"{count:,} {note}")
    if report.incomplete:
        rows = [(suffix, f"{count:,}", what) for suffix, count, what in report.rows()]
        console.print()
        print_table(("suffix", "files", ""), rows, right=False)
        console.print(f"all files that are left out: {output / 'prepare_report.json'}")


@app.command()
def index(manifests: Manifests, jobs: Jobs = 1) -> None:
    """Write the index that training needs for O(1) access. If a manifest has grown, only its new lines are parsed."""
    from w2vscale.corpora.index import build_index
    from w2vscale.data.manifest import index_path

    for manifest in manifests:
        with progress_bar(f"indexing {manifest.name}") as progress:
            count = build_index(manifest, progress, jobs=jobs)
        console.print(f"{index_path(manifest)}: {counted(count, 'utterance')}")


@app.command()
def validate(
    manifests: Manifests,
    audio: Annotated[bool, typer.Option("--audio", help="Decode all audio, as training does.")] = False,
    jobs: Jobs = 4,
) -> None:
    """Compare manifests with the headers of their audio files, or with all audio.

    If they disagree, list the bad utterances in CUTS.jsonl.bad_audio and exit with code 2.
    """
    from w2vscale.corpora.validate import validate_manifest

    for manifest in manifests:
        with progress_bar(f"validating {manifest.name}") as progress:
            found = validate_manifest(manifest, jobs=jobs, audio=audio, progress=progress)
        for bad in found.first[1:]:
            console.print(str(bad))
        if found.bad:
            raise UserError(
                f"{manifest}: {counted(found.bad, 'bad utterance')} of {found.utterances:,}, listed in "
                f"{found.listing}; the first one: {found.first[0]}"
            )
        console.print(f"{manifest}: no problem found in {counted(found.utterances, 'utterance')}")


@app.command()
def shar(
    manifest: IndexedManifest,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Number of utterances per shard.")] = 1000,
    form: Annotated[str, typer.Option("--format", help="Audio format of the shards: flac, wav, opus or mp3.")] = "flac",
    seed: Annotated[int, typer.Option(min=0, help="Seed for the order of utterances.")] = 0,
    jobs: Jobs = 1,
) -> None:
    """Write Lhotse Shar for data.mode=stream. A repeated call continues where the last one stopped."""
    from w2vscale.corpora.shar import write_shards

    with progress_bar(f"writing shards of {manifest.name}") as progress:
        written = write_shards(
            manifest, output, shard_size=shard_size, form=form, seed=seed, jobs=jobs, progress=progress
        )
    for bad in written.bad[:20]:
        console.print(str(bad))
    left_out = f", {counted(len(written.bad), 'bad utterance')} left out, listed in {output}/bad_audio.*.jsonl"
    total = f"{counted(written.shards, 'shard')}, {counted(written.utterances, 'utterance')}"
    console.print(f"{output}: {total}{left_out if written.bad else ''}")


@app.command()
def subset(
    manifest: IndexedManifest,
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="New manifest; its index is written, too.")],
    hours: Annotated[float | None, typer.Option(help="Subset size in hours, sampled with --seed.")] = None,
    balanced_speakers: Annotated[
        bool, typer.Option("--balanced-speakers", help="Give all speakers about the same duration.")
    ] = False,
    identifiers: Annotated[
        Path | None,
        typer.Option("--ids", metavar="FILE", help="Select only the utterances in FILE, one id per line."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
) -> None:
    """Select a subset of a manifest, for example for fine-tuning with little transcribed speech."""
    from w2vscale.corpora.index import build_index
    from w2vscale.corpora.subset import write_subset

    if hours is None and identifiers is None:
        raise UserError("data subset: no subset given; use --hours, --ids or both")
    if output.resolve() == manifest.resolve():
        raise UserError(f"{output}: the output is the manifest itself; choose another name")
    written = write_subset(
        manifest, output, hours=hours, balanced=balanced_speakers, identifiers=identifiers, seed=seed
    )
    build_index(output)
    _show_written([written])


@app.command()
def pieces(
    manifests: Manifests,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.model", help="Write the SentencePiece model to this file.")
    ],
    size: Annotated[int, typer.Option(min=1, help="Number of pieces, including <unk>, <s> and </s>.")] = 500,
) -> None:
    """Train a SentencePiece model for objective.sentencepiece from the transcripts of manifests."""
    from w2vscale.corpora.sentence_pieces import train_pieces

    transcripts = train_pieces(manifests, output, size=size)
    console.print(f"{output}: {counted(size, 'piece')} from {counted(transcripts, 'transcript')}")


@app.command()
def stats(
    manifests: Manifests,
    config: Annotated[
        str, typer.Option(metavar="CONFIG", help="Plan with the settings of this YAML file or preset.")
    ] = "base",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of CONFIG; repeatable."),
    ] = None,
) -> None:
    """Show hours, speakers and durations of a corpus, and the buckets and padding of its plan."""
    from w2vscale.corpora.stats import corpus_stats
    from w2vscale.objectives import load

    settings, objective = load(config, override or [])
    _show_stats(corpus_stats(manifests, settings, objective), settings)


def _show_stats(stats: CorpusStats, config: Config) -> None:
    """Show totals, a histogram of durations, the buckets of the plan, and the shares of a mix."""
    plan, seconds, rate = stats.plan, stats.durations, config.model.sampling_rate
    averages = f"{stats.median:.2f} median, {seconds.mean():.2f} mean"
    totals = {
        "utterances": f"{seconds.size:,}",
        "hours": f"{seconds.sum() / 3600:,.2f}",
        "speakers": f"{stats.speakers:,}",
        "transcribed": f"{stats.transcribed:,}",
        "sampling rates": ", ".join(f"{hz} Hz ({count:,})" for hz, count in sorted(stats.sampling_rates.items())),
        "seconds": f"{seconds.min():.2f} shortest, {averages}, {seconds.max():.2f} longest",
    }
    print_table(("", ""), totals.items(), right=False)

    histogram = stats.histogram()
    most = max(count for _, _, count, _ in histogram)
    console.print()
    print_table(
        ("seconds", "utterances", "hours", ""),
        (
            (f"{start:.1f} - {end:.1f}", f"{count:,}", f"{hours:,.2f}", Bar(most, 0, count, width=40))
            for start, end, count, hours in histogram
        ),
    )

    console.print()
    buckets = list(enumerate(plan.buckets))
    print_table(
        ("bucket", "up to (s)", "utterances", "per micro-batch"),
        (
            (str(number), f"{bucket.longest / rate:.2f}", f"{bucket.count:,}", str(bucket.per_micro_batch))
            for number, bucket in (buckets if len(buckets) <= 12 else buckets[:6] + buckets[-6:])
        ),
    )

    if stats.mix:
        console.print()
        print_table(
            (config.mix.by, "hours", "share of corpus", "share of epoch", "draws per epoch"),
            (
                (name, f"{hours:,.2f}", f"{share:.1%}", f"{epoch_share:.1%}", f"{draws:.2f}")
                for name, hours, share, epoch_share, draws in stats.mix
            ),
        )

    console.print(
        f"plan: {counted(len(plan.buckets), 'bucket')}, {counted(plan.per_epoch, 'micro-batch')} of at most "
        f"{config.batch.max_seconds:g} s per epoch, {plan.padding():.2%} padding; utterances cropped to "
        f"{config.data.max_seconds:g} s, {plan.left_out:,} shorter than {config.data.min_seconds:g} s left out"
    )
