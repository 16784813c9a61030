"""`w2vscale features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Audio, BatchSeconds, Checkpoint


def features(
    checkpoint: Checkpoint,
    audio: Audio,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")],
    layer: Annotated[
        list[int] | None,
        typer.Option(help="0: the first block's input; N: block N's output; repeatable; default: all."),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="npy|safetensors",
            help="npy: layers x frames x dim, of one layer frames x dim; safetensors: layer_N, frames x dim.",
        ),
    ] = "npy",
    batch_seconds: BatchSeconds = 80.0,
    chunk_seconds: Annotated[float, typer.Option(help="Longer audio is computed in chunks.")] = 30.0,
    overlap_seconds: Annotated[float, typer.Option(help="Context on either side of a chunk.")] = 2.5,
) -> None:
    """Hidden states of audio of any length, a file for each; exit code 2 if some audio could not be used."""
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
            form=form,
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
