"""`w2vscale results`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def results(
    metrics: Annotated[
        list[Path], typer.Argument(metavar="METRICS.json...", help="Files written by w2vscale evaluate --output.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.md", help="The Markdown file to write.")
    ] = Path("RESULTS.md"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Results",
) -> None:
    """Write a table of several evaluations, and compare each run NAME with its baseline NAME_scratch."""
    from w2vscale.cli.progress import console
    from w2vscale.evaluation.results import read_results, results_page
    from w2vscale.files import write_text

    page = results_page(read_results(metrics), title)
    write_text(output, page)
    console.print(page, markup=False, soft_wrap=True, highlight=False)
