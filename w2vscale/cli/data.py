"""`w2vscale data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.progress import console, progress_bar

if TYPE_CHECKING:
    from w2vscale.corpora.prepare import PreparedManifest

app = typer.Typer(no_args_is_help=True, help="From audio to indexed manifests.")
prepare_app = typer.Typer(no_args_is_help=True, help="Write Lhotse cut manifests of a corpus.")
app.add_typer(prepare_app, name="prepare")

Manifests = Annotated[list[Path], typer.Argument(metavar="CUTS.jsonl...", help="Lhotse cut manifests.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Parallel jobs.")]
Corpus = Annotated[Path, typer.Argument(metavar="CORPUS", help="The corpus' folder.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Where the manifests go.")]
Parts = Annotated[list[str] | None, typer.Option("--part", help="E.g. train-clean-100; repeatable; default: all.")]


@prepare_app.command()
def librispeech(corpus: Corpus, output: Output, part: Parts = None, jobs: Jobs = 1) -> None:
    """LibriSpeech: OUT/cuts_PART.jsonl for each part."""
    _prepare_librispeech(corpus, output, part, jobs, mini=False)


@prepare_app.command("mini_librispeech")
def mini_librispeech(corpus: Corpus, output: Output, part: Parts = None, jobs: Jobs = 1) -> None:
    """Mini LibriSpeech: train-clean-5 and dev-clean-2."""
    _prepare_librispeech(corpus, output, part, jobs, mini=True)


@prepare_app.command()
def folder(
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="Any tree of wav, flac, ogg, opus and mp3.")],
    output: Output,
    window: Annotated[
        float | None, typer.Option(help="Cut longer recordings into windows of this many seconds.")
    ] = None,
    validation_share: Annotated[
        float, typer.Option(help="Share of the recordings that go into cuts_validation.jsonl.")
    ] = 0.0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that are not audio.")
    ] = False,
    jobs: Jobs = 1,
) -> None:
    """Any folder of audio; a .txt beside a file is its transcript."""
    from w2vscale.corpora.prepare import prepare_folder

    with progress_bar("reading headers") as progress:
        written = prepare_folder(
            audio,
            output,
            jobs=jobs,
            window_seconds=window,
            validation_share=validation_share,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )
    _print_written(written)


def _prepare_librispeech(corpus: Path, output: Path, parts: list[str] | None, jobs: int, *, mini: bool) -> None:
    from w2vscale.corpora.prepare import prepare_librispeech

    _print_written(prepare_librispeech(corpus, output, parts=parts, mini=mini, jobs=jobs))


def _print_written(written: list[PreparedManifest]) -> None:
    for manifest in written:
        left_out = f", {manifest.left_out} unreadable files left out" if manifest.left_out else ""
        console.print(
            f"{manifest.path}: {manifest.utterances} utterances, {manifest.hours:.2f} hours{left_out}",
            markup=False,
        )
    if written[0].known:
        console.print(
            f"{written[0].read} audio files were read, {written[0].known} are as an earlier call read them",
            markup=False,
        )


@app.command()
def index(manifests: Manifests, jobs: Jobs = 1) -> None:
    """Write the index that gives training O(1) access to a manifest; of one that grew, only new lines are parsed."""
    from w2vscale.corpora.index import build_index
    from w2vscale.data.manifest import index_path

    for manifest in manifests:
        with progress_bar(f"indexing {manifest.name}") as progress:
            count = build_index(manifest, progress, jobs=jobs)
        console.print(f"{index_path(manifest)}: {count} utterances", markup=False)


@app.command()
def validate(
    manifests: Manifests,
    audio: Annotated[bool, typer.Option("--audio", help="Decode every utterance, as training will.")] = False,
    jobs: Jobs = 4,
) -> None:
    """Compare manifests with their audio files' headers, or with --audio all of the audio; exit code 2 if they
    disagree, with all bad utterances in CUTS.jsonl.bad_audio.
    """
    from w2vscale.corpora.validate import validate_manifest
    from w2vscale.errors import UserError

    for manifest in manifests:
        with progress_bar(f"validating {manifest.name}") as progress:
            found = validate_manifest(manifest, jobs=jobs, audio=audio, progress=progress)
        for bad in found.first[1:]:
            console.print(f"{bad.utterance} ({bad.file}): {bad.reason}", markup=False)
        if found.bad:
            first = found.first[0]
            raise UserError(
                f"{manifest}: {found.bad} of {found.utterances} utterances are wrong, all in {found.listing}; "
                f"the first: {first.utterance} ({first.file}): {first.reason}"
            )
        console.print(f"{manifest}: {found.utterances} utterances agree with their files", markup=False)


@app.command()
def shar(
    manifest: Annotated[Path, typer.Argument(metavar="CUTS.jsonl", help="An indexed Lhotse cut manifest.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the shards go.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Utterances per shard.")] = 1000,
    form: Annotated[str, typer.Option("--format", help="flac, wav, opus or mp3.")] = "flac",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of utterances.")] = 0,
    jobs: Jobs = 1,
) -> None:
    """Write Lhotse Shar for data.mode=stream; a repeat goes on where it was stopped."""
    from w2vscale.corpora.shar import write_shards

    with progress_bar(f"writing shards of {manifest.name}") as progress:
        written = write_shards(
            manifest, output, shard_size=shard_size, form=form, seed=seed, jobs=jobs, progress=progress
        )
    for bad in written.bad[:20]:
        console.print(f"{bad.utterance} ({bad.file}): {bad.reason}", markup=False)
    left_out = f", {len(written.bad)} unusable ones left out ({output}/bad_audio.*.jsonl)" if written.bad else ""
    console.print(f"{output}: {written.shards} shards, {written.utterances} utterances{left_out}", markup=False)


@app.command()
def subset(
    manifest: Annotated[Path, typer.Argument(metavar="CUTS.jsonl", help="An indexed Lhotse cut manifest.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The part of it; it is indexed, too.")],
    hours: Annotated[float | None, typer.Option(help="Take so much, drawn from --seed.")] = None,
    balanced_speakers: Annotated[
        bool, typer.Option("--balanced-speakers", help="Give speakers about equal time.")
    ] = False,
    identifiers: Annotated[
        Path | None, typer.Option("--ids", metavar="FILE", help="Take these alone: an utterance a line.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a part of a manifest, as for fine-tuning with few transcripts."""
    from w2vscale.corpora.index import build_index
    from w2vscale.corpora.subset import write_subset
    from w2vscale.errors import UserError

    if hours is None and identifiers is None:
        raise UserError("data subset: say which part: --hours, --ids or both")
    if output.resolve() == manifest.resolve():
        raise UserError(f"{output}: is the manifest itself; choose another name")
    written = write_subset(
        manifest, output, hours=hours, balanced=balanced_speakers, identifiers=identifiers, seed=seed
    )
    build_index(output)
    console.print(f"{output}: {written.utterances} utterances, {written.hours:.2f} hours", markup=False)


@app.command()
def pieces(
    manifests: Manifests,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.model", help="The SentencePiece model.")],
    size: Annotated[int, typer.Option(min=1, help="Pieces, with <unk>, <s> and </s>.")] = 500,
) -> None:
    """Train sentence pieces from transcripts, as they are, for ctc.sentencepiece."""
    from w2vscale.corpora.sentence_pieces import train_pieces

    trained = train_pieces(manifests, output, size=size)
    console.print(f"{output}: {trained.pieces} pieces from {trained.transcripts} transcripts", markup=False)


@app.command()
def stats(
    manifests: Manifests,
    config: Annotated[str, typer.Option(help="YAML file or preset whose crop and budget to plan with.")] = "base",
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
) -> None:
    """Hours, speakers and durations of a corpus, and how it would be bucketed."""
    from w2vscale.cli.data_tables import print_stats
    from w2vscale.config import load_config
    from w2vscale.corpora.stats import corpus_stats

    settings = load_config(config, override or [])
    print_stats(corpus_stats(manifests, settings), settings)
