"""`w2vscale report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    exps: Annotated[list[Path], typer.Argument(metavar="EXP...", help="Run folders to draw in one figure.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The image file to write.", show_default="EXP/curves.png"),
    ] = None,
) -> None:
    """Draw the curves of one or several runs, and print their latest metrics."""
    from rich.table import Table

    from w2vscale.analysis.report import draw_curves, is_fine_tuning, summarise
    from w2vscale.cli.progress import console

    picture = draw_curves(exps, output or exps[0] / "curves.png")
    found = [summarise(exp) for exp in exps]
    fine_tuning = is_fine_tuning(found[0].training)
    loss, share = ("loss", "label errors") if fine_tuning else ("bits", "accuracy")
    keys = ("loss", "label_error_rate") if fine_tuning else ("contrastive_bits", "accuracy")
    table = Table(box=None, header_style="bold")
    for column in (
        "run", "updates", "hours seen", f"training {loss}", share, f"validation {loss}", share, "codes"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "run" else "right")
    for exp, run in zip(exps, found, strict=True):
        # Training does not decode, so it has no label error rate.
        metrics = [{**run.training, "label_error_rate": None}, run.validation or {}]
        table.add_row(
            exp.name,
            f"{run.update:,}",
            f"{run.hours_seen:,.2f}",
            *(_number(record.get(key), 3) for record in metrics for key in keys),
            "/".join(_number(perplexity, 0) for perplexity in run.code_perplexities) or "-",
        )
    console.print(table)
    console.print(f"curves: {picture}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
