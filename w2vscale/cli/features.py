"""`w2vscale features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Audio, BatchSeconds, Checkpoint


def features(
    checkpoint: Checkpoint,
    audio: Audio,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write to.")],
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer to write; repeatable. 0: input of the first block; N: output of block N.", show_default="all"
        ),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="npy|safetensors",
            help="npy: an array of layers x frames x dim (frames x dim for one layer); "
            "safetensors: a tensor layer_N of frames x dim for each layer.",
        ),
    ] = "npy",
    batch_seconds: BatchSeconds = 80.0,
    chunk_seconds: Annotated[
        float, typer.Option(help="Split longer audio into chunks of at most this length, in seconds.")
    ] = 30.0,
    overlap_seconds: Annotated[float, typer.Option(help="Context on either side of a chunk, in seconds.")] = 2.5,
) -> None:
    """Write the hidden states of audio of any length, a file per utterance.

    Exits with code 2 if some audio could not be used.
    """
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.errors import UserError
    from w2vscale.inference.features import write_features
    from w2vscale.inference.pretrained import load

    with progress_bar("seconds of audio") as progress:
        found = write_features(
            load(checkpoint),
            audio,
            output,
            layers=layer,
            file_format=file_format,
            chunk_seconds=chunk_seconds,
            overlap_seconds=overlap_seconds,
            batch_seconds=batch_seconds,
            progress=progress,
        )
    layers = f"{len(found.layers)} layer{'s' * (len(found.layers) > 1)}"
    console.print(f"{output}: {found.files:,} files, {found.frames:,} frames of {layers}", markup=False)
    for bad in found.bad[1:]:
        console.print(f"{bad.file}: {bad.reason}", markup=False)
    if found.bad:
        first = found.bad[0]
        raise UserError(
            f"{first.file}: {first.reason}; {len(found.bad)} of {found.files + len(found.bad)} utterances "
            "could not be used"
        )
