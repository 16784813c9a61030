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

    from w2vscale.analysis.report import draw_curves, summarise
    from w2vscale.cli.progress import console

    picture = draw_curves(exps, output or exps[0] / "curves.png")
    found = [summarise(exp) for exp in exps]
    loss, telling, other = (panel.title for panel in found[0].panels)
    table = Table(box=None, header_style="bold")
    for column in (
        "run", "updates", "hours seen", f"training {loss}", telling, f"validation {loss}", telling, other
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "run" else "right")
    for exp, run in zip(exps, found, strict=True):
        last = run.validation[2] if any(value is not None for value in run.validation[2]) else run.training[2]
        table.add_row(
            exp.name,
            f"{run.update:,}",
            f"{run.hours_seen:,.2f}",
            *("/".join(map(_number, values)) for values in (*run.training[:2], *run.validation[:2], last)),
        )
    console.print(table)
    console.print(f"curves: {picture}", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.0f}"
