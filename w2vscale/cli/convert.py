"""`w2vscale export` and `w2vscale import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Checkpoint
from w2vscale.cli.progress import bytes_bar, console


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    form: Annotated[str, typer.Option("--format", help="huggingface, fairseq2 or torchaudio.")] = "huggingface",
) -> None:
    """Export a model for use with another library.

    huggingface: a folder for from_pretrained of Transformers. fairseq2: model.pt with its asset card.
    torchaudio: the encoder weights for Wav2Vec2Model.
    """
    from w2vscale.interop.exporting import export_checkpoint

    with bytes_bar("exporting") as progress:
        exported = export_checkpoint(checkpoint, output, form=form, progress=progress, log=console.print)
    for file in exported.files:
        console.print(f"{file}: {file.stat().st_size:,} bytes")


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A Transformers model folder, or a fairseq or fairseq2 .pt file.")
    ],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write the checkpoint to.")],
    form: Annotated[
        str, typer.Option("--format", help="huggingface, fairseq, fairseq2, or auto: recognise it from the source.")
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Symbols of a CTC model: a SentencePiece model of fairseq2 (default: *tokenizer*.model beside "
            "SOURCE), or a dictionary of fairseq (default: dict*.txt beside SOURCE).",
        ),
    ] = None,
) -> None:
    """Convert a model of another library to a checkpoint.

    The checkpoint contains weights but no optimizer state. To train it further:
    w2vscale train DIR trainer.init_from=DIR data.train=CUTS --exp EXP.
    """
    from w2vscale.interop.importing import import_checkpoint

    with bytes_bar("importing") as progress:
        imported = import_checkpoint(
            source, output, form=form, tokenizer=tokenizer, progress=progress, log=console.print
        )
    console.print(f"{imported.checkpoint}: {imported.parameters:,} parameters")
