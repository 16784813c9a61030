"""`w2vscale transcribe` and `w2vscale features`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli import arguments
from w2vscale.cli.progress import console, progress_bar
from w2vscale.errors import UserError, counted
from w2vscale.files import nearest_path
from w2vscale.terminal import visible

if TYPE_CHECKING:
    from w2vscale.data.micro_batch import BadAudio


def _some_exist(paths: list[Path]) -> list[Path]:
    """Raise UserError, before anything slow, if there is nothing to do: none of the paths exists."""
    if not any(path.exists() for path in paths):
        count = len(paths)
        raise UserError(
            f"{paths[0]}: no such file{nearest_path(paths[0])}; {count} of {count} utterances could not be used"
        )
    return paths


Audio = Annotated[
    list[Path],
    typer.Argument(
        metavar="AUDIO...",
        help="Audio files, folders of audio files, or Lhotse cut manifests (*.jsonl).",
        callback=_some_exist,
    ),
]
FORMAT = (
    "npy: an array of layers x frames x dim (frames x dim for one layer); "
    "safetensors: a tensor layer_N of frames x dim for each layer."
)

TRANSCRIPTS = (
    "txt: a line per utterance: name, tab, text; json: an object per utterance with the times and scores of its words; "
    "srt: subtitles; ctm: a line per word: recording, channel, start, duration, word, score."
)


def transcribe(
    context: typer.Context,
    checkpoint: arguments.CheckpointPlace,
    audio: Audio,
    form: Annotated[str, typer.Option("--format", metavar="txt|json|srt|ctm", help=TRANSCRIPTS)] = "txt",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="With --format srt: write DIR/RECORDING.srt per recording."),
    ] = None,
    beam: arguments.Beam = None,
    lm: arguments.LanguageModel = None,
    lexicon: arguments.Lexicon = None,
    lm_weight: arguments.LmWeight = 2.0,
    word_score: arguments.WordScore = -1.0,
    channel: arguments.Channel = "mean",
    batch_seconds: arguments.BatchSeconds = 80.0,
    weights: arguments.Weights = None,
    nproc_per_node: arguments.Processes = 1,
) -> None:
    """Transcribe audio with a fine-tuned model, shortest utterance first.

    Prints a line per utterance: name, tab, text. --format adds the times of words. Exits with code 2 if some audio
    could not be used.
    """
    of_channel = arguments.channel_number(channel)
    from w2vscale.data.micro_batch import BadAudio
    from w2vscale.distributed.process_group import LONG_TIMEOUT, gather_as_found, process_group
    from w2vscale.inference.decoding import BeamSearch
    from w2vscale.inference.pretrained import load_on_all_ranks
    from w2vscale.inference.transcript_formats import (
        LINES,
        check_format,
        ctm,
        line_of,
        subtitles,
        write_subtitles,
    )
    from w2vscale.inference.transcription import Transcript
    from w2vscale.inference.transcription import transcribe as transcripts
    from w2vscale.inference.utterances import find_utterances

    arguments.launch_if_asked(context, nproc_per_node)
    bad: list[BadAudio] = []
    used = 0
    kept: list[Transcript] = []  # for formats that are written at the end
    utterances = find_utterances(audio, channel=of_channel)
    check_format(form, utterances, output)
    with process_group(timeout=LONG_TIMEOUT) as (ranks, device), progress_bar("seconds of audio") as progress:
        log = (lambda text: typer.echo(visible(text), err=True)) if ranks.is_main else lambda text: None
        stream = transcripts(
            load_on_all_ranks(checkpoint, log, device=device, weights=weights),
            utterances,
            search=BeamSearch.from_options(beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score),
            ranks=ranks,
            batch_seconds=batch_seconds,
            progress=progress,
            log=log,
        )
        for found in gather_as_found(stream):
            if not ranks.is_main:
                continue
            if isinstance(found, BadAudio):
                bad.append(found)
                continue
            used += 1
            if form in LINES:
                typer.echo(visible(line_of(found, form)))
            else:
                kept.append(found)
    if ranks.is_main:
        if output is not None:
            for path in write_subtitles(kept, utterances, output):
                console.print(f"{path}")
        elif form not in LINES:
            typer.echo(visible(ctm(kept) if form == "ctm" else subtitles(kept)), nl=False)
    _refuse_bad(bad, used)


def features(
    checkpoint: arguments.Checkpoint,
    audio: Audio,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write to.")],
    layer: arguments.Layers = None,
    file_format: Annotated[str, typer.Option("--format", metavar="npy|safetensors", help=FORMAT)] = "npy",
    channel: arguments.Channel = "mean",
    batch_seconds: arguments.BatchSeconds = 80.0,
    chunk_seconds: Annotated[
        float, typer.Option(help="Split longer audio into chunks of at most this length, in seconds.")
    ] = 30.0,
    overlap_seconds: Annotated[float, typer.Option(help="Context on either side of a chunk, in seconds.")] = 2.5,
    weights: arguments.Weights = None,
) -> None:
    """Write the hidden states of audio of any length, a file per utterance.

    Exits with code 2 if some audio could not be used.
    """
    of_channel = arguments.channel_number(channel)
    from w2vscale.inference.features import check_format, write_features
    from w2vscale.inference.pretrained import load

    check_format(file_format)
    with progress_bar("seconds of audio") as progress:
        found = write_features(
            load(checkpoint, weights=weights),
            audio,
            output,
            channel=of_channel,
            layers=layer,
            file_format=file_format,
            chunk_seconds=chunk_seconds,
            overlap_seconds=overlap_seconds,
            batch_seconds=batch_seconds,
            progress=progress,
        )
    console.print(
        f"{output}: {counted(found.files, 'file')}, {found.frames:,} frames of {counted(len(found.layers), 'layer')}"
    )
    _refuse_bad(found.bad, found.files)


def _refuse_bad(bad: Sequence[BadAudio], used: int) -> None:
    """List the audio that could not be used, and raise an error that names the first and counts all."""
    for one in bad[1:]:
        typer.echo(visible(f"{one.file}: {one.reason}"), err=True)
    if bad:
        raise UserError(f"{bad[0].file}: {bad[0].reason}; {len(bad)} of {used + len(bad)} utterances could not be used")
