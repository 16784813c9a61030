"""`w2vscale evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder: its newest.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the checkpoint's."),
    ] = None,
    cuts: Annotated[
        list[Path] | None,
        typer.Option("--cuts", metavar="CUTS.jsonl", help="An indexed manifest; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
) -> None:
    """Loss, accuracy and use of codebooks of a pretrained checkpoint; loss and errors of a fine-tuned one."""
    from rich.table import Table

    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.errors import UserError
    from w2vscale.evaluation.checkpoint import evaluate_checkpoint

    with progress_bar("evaluating") as progress:
        found = evaluate_checkpoint(checkpoint, cuts or [], overrides or [], progress=progress, log=console.print)
    if found is None:
        return
    values = found.metrics
    table = Table(title=f"{found.checkpoint.name} on {int(values['utterances'])} utterances", box=None)
    table.add_column("figure")
    table.add_column("value", justify="right")
    if "labels" in values:
        table.add_row("loss of a label", f"{values['loss']:.4f} nats")
        table.add_row("label error rate, greedy", f"{values['label_error_rate']:.2%}")
        table.add_row("labels", f"{int(values['labels']):,}")
    else:
        table.add_row("contrastive loss", f"{values['contrastive']:.4f} nats = {values['contrastive_bits']:.4f} bits")
        table.add_row("contrastive accuracy", f"{values['accuracy']:.4f}")
        table.add_row("diversity loss", f"{values['diversity']:.4f}")
        table.add_row("masked frames", f"{int(values['masked_frames']):,}")
    for codebook, used in enumerate(found.used_entries):
        table.add_row(
            f"codebook {codebook}",
            f"{used} of {found.codebook_entries} entries used, "
            f"code perplexity {values[f'code_perplexity_{codebook}']:.1f}",
        )
    if values["unusable_utterances"]:
        table.add_row("unusable utterances", f"{int(values['unusable_utterances'])}")
    console.print(table)
    if output is not None:
        document = {"checkpoint": str(found.checkpoint), "update": found.update, **values}
        document |= {f"used_entries_{codebook}": used for codebook, used in enumerate(found.used_entries)}
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(document, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from None
