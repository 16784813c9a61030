"""`w2vscale results`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def results(
    figures: Annotated[
        list[Path], typer.Argument(metavar="FIGURES.json...", help="What `w2vscale evaluate --output` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.md")] = Path("RESULTS.md"),
    title: Annotated[str, typer.Option(help="The first line.")] = "Results",
) -> None:
    """Write a table of several evaluations; a run NAME is compared with NAME_scratch."""
    from w2vscale.cli.files import write_text
    from w2vscale.cli.progress import console
    from w2vscale.evaluation.results import read_results, results_page

    page = results_page(read_results(figures), title)
    write_text(output, page)
    console.print(page, markup=False, soft_wrap=True, highlight=False)
