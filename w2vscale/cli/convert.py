"""`w2vscale export` and `w2vscale import`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.progress import console


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    form: Annotated[str, typer.Option("--format", help="huggingface or torchaudio.")] = "huggingface",
) -> None:
    """Write a model for other libraries.

    huggingface: Transformers loads DIR with from_pretrained. torchaudio: the encoder's state for its Wav2Vec2Model.
    """
    from w2vscale.interop.exporting import export_checkpoint

    written = export_checkpoint(checkpoint, output, form=form, log=partial(console.print, markup=False))
    for file in written.files:
        console.print(f"{file}: {file.stat().st_size:,} bytes", markup=False)


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of Transformers', or fairseq's .pt file.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes.")],
    form: Annotated[str, typer.Option("--format", help="huggingface or fairseq.")] = "huggingface",
) -> None:
    """Take up another library's model.

    The checkpoint has weights and no optimizer state: start from it with trainer.init_from=DIR.
    """
    from w2vscale.interop.importing import import_checkpoint

    imported = import_checkpoint(source, output, form=form, log=partial(console.print, markup=False))
    console.print(f"{imported.checkpoint}: {imported.parameters:,} parameters", markup=False)
