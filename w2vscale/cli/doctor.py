"""`w2vscale doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from w2vscale.cli.arguments import Processes, launch_if_asked
from w2vscale.cli.progress import console
from w2vscale.terminal import visible

if TYPE_CHECKING:
    from w2vscale.diagnosis.finding import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NAME_WIDTH = 20  # columns; a longer name is folded


def doctor(
    context: typer.Context,
    exp: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder: its disk is measured, and all hosts must see it.",
            show_default="the current folder",
        ),
    ] = None,
    nproc_per_node: Processes = 1,
    timeout: Annotated[
        int,
        typer.Option(
            min=1, max=86_400, metavar="SECONDS", help="Stop a check, or waiting for other ranks, after this time."
        ),
    ] = 120,
) -> None:
    """Check the software, the machine, the disk and the network, and say what to do about problems.

    The exit code is 1 if a check fails. To check the network between ranks, too, start it as you start training
    (torchrun, srun or --nproc-per-node).
    """
    launch_if_asked(context, nproc_per_node)
    from w2vscale.diagnosis.doctor import examine
    from w2vscale.diagnosis.finding import failed, summary
    from w2vscale.runtime import exit_on_signals, hide_failed_connections

    hide_failed_connections()  # the report names them
    # Closed here, so that Ctrl-C while a row is printed also waits until the checks have cleaned up.
    with exit_on_signals(), closing(examine(exp, timeout=timeout)) as made:
        findings = list(_shown(made))
    if findings:  # rank 0 has them
        console.print(summary(findings))
    raise typer.Exit(int(failed(findings)))


def _shown(findings: Iterable[Finding]) -> Iterable[Finding]:
    """Print each finding when it is made."""
    for finding in findings:
        # A table per row, so that a row is printed at once: the widths are the same for all.
        row = Table.grid(padding=(0, 2))
        row.add_column(width=4)
        row.add_column(width=NAME_WIDTH, overflow="fold")
        row.add_column(overflow="fold")
        text = Text(visible(finding.found))  # may be the words of a library
        if finding.advice:
            text.append(f"\n→ {visible(finding.advice)}", style="bold")
        row.add_row(Text(finding.verdict, style=STYLES[finding.verdict]), finding.name, text)
        console.print(row)
        yield finding
