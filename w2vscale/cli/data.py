"""`w2vscale data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar

from w2vscale.cli import prepare
from w2vscale.cli.arguments import Jobs, Manifests, PartOption, UrlSchemes
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import UserError, counted

if TYPE_CHECKING:
    from w2vscale.config import Config
    from w2vscale.corpora.stats import CorpusStats

SHOWN = 20  # list at most this many bad utterances
RARE = 10  # show an example of a symbol that occurs less often

app = typer.Typer(no_args_is_help=True, help="Prepare, index and check corpora.")
app.add_typer(prepare.app, name="prepare")

IndexedManifest = Annotated[Path, typer.Argument(metavar="CUTS.jsonl", help="An indexed Lhotse cut manifest.")]


@app.command()
def index(
    corpora: Annotated[
        list[str],
        typer.Argument(
            metavar="CUTS.jsonl|SHARDS...", help="Lhotse cut manifests (paths or URLs), or folders of shards."
        ),
    ],
    url_scheme: UrlSchemes = None,
    jobs: Jobs = 1,
) -> None:
    """Write the index that training needs for O(1) access. Only what is new in a manifest or folder is parsed.

    The index of a manifest at a URL is written beside it.
    """
    from w2vscale.corpora.index import build_index
    from w2vscale.storage.urls import place

    for corpus in map(place, corpora):
        if isinstance(corpus, Path) and corpus.is_dir() and any(corpus.glob("cuts.*.jsonl*")):
            _index_folder(corpus, jobs)
            continue
        with progress_bar(f"indexing {corpus.name}") as progress:
            count = build_index(corpus, progress, jobs=jobs, schemes=("file", *(url_scheme or ())))
        console.print(f"{corpus}.index.npy: {counted(count, 'utterance')}")


def _index_folder(folder: Path, jobs: int) -> None:
    from w2vscale.corpora.shard_index import bad_shards_path, index_shards
    from w2vscale.data.shard_index import shard_index_path

    with progress_bar(f"indexing shards of {folder.name}") as progress:
        found = index_shards(folder, progress, jobs=jobs)
    for bad in found.bad[:SHOWN]:
        console.print(str(bad))
    left_out = f", {counted(len(found.bad), 'bad utterance')} left out, listed in {bad_shards_path(folder)}"
    total = f"{counted(found.shards, 'shard')}, {counted(found.utterances, 'utterance')}"
    console.print(f"{shard_index_path(folder)}: {total}{left_out if found.bad else ''}")


def _local(manifests: list[str]) -> list[Path]:
    """The manifests, with copies on this machine in place of URLs."""
    from w2vscale.data.manifest import local_manifest
    from w2vscale.storage.urls import place

    return [local_manifest(place(manifest)) for manifest in manifests]


@app.command()
def validate(
    manifests: Manifests,
    audio: Annotated[bool, typer.Option("--audio", help="Decode all audio, as training does.")] = False,
    part: PartOption = "1/1",
    url_scheme: UrlSchemes = None,
    jobs: Jobs = 4,
) -> None:
    """Compare manifests with the headers of their audio files, or with all audio.

    If they disagree, list the bad utterances in CUTS.jsonl.bad_headers or .bad_audio, and exit with code 2. With
    --part, the name of the list ends with .K-of-N. The list of a manifest at a URL is in the current folder.
    """
    from w2vscale.corpora.parallel import Part
    from w2vscale.corpora.validate import validate_manifest
    from w2vscale.storage.urls import place

    problems, of_part = [], "" if part == "1/1" else f" of part {part}"
    schemes = ("file", *(url_scheme or ()))
    for manifest in map(place, manifests):
        with progress_bar(f"validating {manifest.name}") as progress:
            found = validate_manifest(
                manifest, jobs=jobs, audio=audio, part=Part.parse(part), progress=progress, schemes=schemes
            )
        for bad in found.first[1:]:
            console.print(str(bad))
        if found.bad:
            problems.append(
                f"{manifest}: {counted(found.bad, 'bad utterance')} of {found.utterances:,}{of_part}, listed in "
                f"{found.listing}; the first one: {found.first[0]}"
            )
            continue
        where = "" if audio else "the headers of "
        console.print(f"{manifest}: no problem found in {where}{counted(found.utterances, 'utterance')}{of_part}")
    for problem in problems[:-1]:
        console.print(problem)
    if problems:
        raise UserError(problems[-1])


@app.command()
def shar(
    manifest: IndexedManifest,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Number of utterances per shard.")] = 1000,
    form: Annotated[str, typer.Option("--format", help="Audio format of the shards: flac, wav, opus or mp3.")] = "flac",
    seed: Annotated[int, typer.Option(min=0, help="Seed for the order of utterances.")] = 0,
    part: PartOption = "1/1",
    jobs: Jobs = 1,
) -> None:
    """Write Lhotse Shar for data.mode=stream. A repeated call continues where the last one stopped."""
    from w2vscale.corpora.parallel import WHOLE, Part
    from w2vscale.corpora.shar import write_shards

    of = Part.parse(part)

    with progress_bar(f"writing shards of {manifest.name}") as progress:
        written = write_shards(
            manifest, output, shard_size=shard_size, form=form, seed=seed, jobs=jobs, part=of, progress=progress
        )
    for bad in written.bad[:SHOWN]:
        console.print(str(bad))
    left_out = f", {counted(len(written.bad), 'bad utterance')} left out, listed in {output}/bad_audio.*.jsonl"
    total = f"{counted(written.shards, 'shard')}, {counted(written.utterances, 'utterance')}"
    console.print(f"{output}: {total}{left_out if written.bad else ''}")
    if of != WHOLE:
        console.print("when all parts are written, the same command without --part writes the index")


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
    prepare.show_written([written])


@app.command()
def relocate(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Folder that the audio was in: a path or a URL.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Folder that the audio is in now: a path or a URL.")],
    manifests: Annotated[list[Path], typer.Argument(metavar="CUTS.jsonl...", help="Lhotse cut manifests.")],
) -> None:
    """Change the paths in manifests after the audio was moved from OLD to NEW, and index them.

    Example: w2vscale data relocate /data s3://bucket/data cuts_train.jsonl
    """
    from w2vscale.corpora.relocate import relocate as change_paths
    from w2vscale.storage.urls import place

    for manifest, found in change_paths(manifests, place(old), place(new)).items():
        console.print(f"{manifest}: {counted(found.changed, 'path')} changed")
        if found.missing:
            console.print(
                f"{manifest}: {found.missing:,} of them lead to no file; list them with: w2vscale data validate"
            )
        if found.others:
            console.print(f"{manifest}: {counted(found.others, 'path')} not below {old} left as before")


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

    transcripts = train_pieces(_local(manifests), output, size=size)
    console.print(f"{output}: {counted(size, 'piece')} from {counted(transcripts, 'transcript')}")


@app.command()
def vocabulary(
    manifests: Manifests,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the symbols to this file, one per line."),
    ] = None,
    case: Annotated[
        str, typer.Option(metavar="CASE", help="Convert letters, one by one: keep, lower or upper.")
    ] = "keep",
    phones: Annotated[
        bool, typer.Option("--phones", help="Count the symbols between spaces, such as phones, in place of letters.")
    ] = False,
    min_count: Annotated[int, typer.Option(min=1, metavar="N", help="Leave out symbols that occur less often.")] = 1,
    jobs: Jobs = 1,
) -> None:
    """Count the symbols of the transcripts of manifests, and write a vocabulary for objective.vocabulary."""
    from w2vscale.corpora.vocabulary import choose_symbols, count_symbols, describe_characters, write_vocabulary
    from w2vscale.data.vocabulary import show_symbol

    with progress_bar("counting symbols") as progress:
        found = count_symbols(_local(manifests), case=case, phones=phones, jobs=jobs, progress=progress)
    symbols, left_out = choose_symbols(found, min_count=min_count, phones=phones)
    total = found.counts.total()
    print_table(
        ("symbol", "count", "share", "code points", "example"),
        (
            (
                symbol,
                f"{count:,}",
                f"{count / total:.3%}",
                describe_characters(symbol),
                found.examples[symbol] if count < RARE or symbol in left_out else "",
            )
            for symbol, count in found.most_common()
        ),
        right=False,
    )
    console.print(
        f"{counted(len(found.counts), 'symbol')}, {total:,} times in {counted(found.transcripts, 'transcript')}; "
        f"{counted(found.untranscribed, 'utterance')} without a transcript"
    )
    if found.turkish:
        console.print("letters were paired as in Turkish (I and ı, İ and i), because the transcripts have ı or İ")
    if left_out:
        listed = ", ".join(map(show_symbol, left_out))
        console.print(f"left out ({counted(sum(found.counts[one] for one in left_out), 'occurrence')}): {listed}")
    if output is not None:
        write_vocabulary(output, symbols)
        split = " objective.split=spaces" if phones else ""
        console.print(f"{output}: {counted(len(symbols), 'symbol')}; use it with objective.vocabulary={output}{split}")


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
    from w2vscale.storage.urls import place

    settings, objective = load(config, override or [])
    with progress_bar("utterances") as progress:
        found = corpus_stats([place(manifest) for manifest in manifests], settings, objective, progress=progress)
    _show_stats(found, settings)


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
