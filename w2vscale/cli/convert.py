"""`w2vscale export` and `w2vscale import`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Checkpoint, Weights
from w2vscale.cli.progress import bytes_bar, console
from w2vscale.errors import UserError
from w2vscale.files import nearest_path


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    form: Annotated[str, typer.Option("--format", help="huggingface, fairseq2, torchaudio or onnx.")] = "huggingface",
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence in the model card, such as apache-2.0 or other."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Language in the model card, such as de; repeatable.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Error rates in the model card: a file written by w2vscale evaluate --wer --output; repeatable.",
            show_default="those of the checkpoint in the run folder",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="Then upload the folder to this model repository on the Hugging Face Hub."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a private repository.")] = False,
    weights: Weights = None,
) -> None:
    """Export a model for use with another library.

    huggingface: a folder for from_pretrained of Transformers. fairseq2: model.pt with its asset card.
    torchaudio: the encoder weights for Wav2Vec2Model. onnx: a graph for onnxruntime.
    """
    from w2vscale.checkpoint.new_folder import refuse_used

    refuse_used(output)  # at once; the next imports take seconds
    from w2vscale.evaluation.results import error_rates_of
    from w2vscale.interop import hub
    from w2vscale.interop.exporting import CHOOSE, WITH_CARD, export_checkpoint
    from w2vscale.interop.model_card import CardDetails

    given = {"--results": results, "--push-to-hub": push_to_hub}
    if form not in WITH_CARD and (option := next((name for name, value in given.items() if value), None)):
        raise UserError(f"{option}: --format {form} has no model card; {CHOOSE}")
    if private and not push_to_hub:
        raise UserError("--private: only applies to --push-to-hub ORG/NAME")
    if push_to_hub:
        hub.check_repository(push_to_hub)
    details = CardDetails(license_, tuple(language or ())) if license_ or language else None
    with bytes_bar("exporting") as progress:
        exported = export_checkpoint(
            checkpoint,
            output,
            form=form,
            weights=weights,
            details=details,
            error_rates=partial(error_rates_of, files=results, log=console.print),
            progress=progress,
            log=console.print,
        )
    for file in exported.files:
        console.print(f"{file}: {file.stat().st_size:,} bytes")
    if push_to_hub:
        console.print(f"uploading {output} to {push_to_hub} on the Hugging Face Hub")
        console.print(f"uploaded: {hub.push_to_hub(output, push_to_hub, private=private)}")


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
    from w2vscale.checkpoint.new_folder import folder_for_one

    folder_for_one(output)
    if not source.exists():
        hint = nearest_path(source) or "; download the model first, e.g. with: hf download"
        raise UserError(f"{source}: no such folder or file{hint}")
    from w2vscale.interop.importing import import_checkpoint

    with bytes_bar("importing") as progress:
        imported = import_checkpoint(
            source, output, form=form, tokenizer=tokenizer, progress=progress, log=console.print
        )
    console.print(f"{imported.checkpoint}: {imported.parameters:,} parameters")
