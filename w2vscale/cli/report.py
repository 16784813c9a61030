"""`w2vscale report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    exps: Annotated[list[Path], typer.Argument(metavar="EXP...", help="Folders of runs, drawn together.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="PNG.", show_default="EXP/curves.png"),
    ] = None,
) -> None:
    """Draw the curves of one or several runs."""
    from w2vscale.evaluation.report import draw_curves

    typer.echo(draw_curves(exps, output or exps[0] / "curves.png"))
