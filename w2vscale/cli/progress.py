"""The console, tables, and a progress bar for long steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from w2vscale.terminal import VisibleConsole

# Wide, so that tables in a file or a pipe are not cut to 80 columns. No markup: names may contain brackets.
console = VisibleConsole(soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)

PROSE = 24
"""Characters within which a column of text can still be read."""


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[RenderableType]], *, title: str | None = None, right: bool = True
) -> None:
    """Print a table. The first column is aligned to the left and the others to the right, if `right`.

    On a terminal that is too narrow for the table, each row is printed as a block with a line for each column.
    """
    rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    widths = [
        max(console.measure(cell).maximum for cell in (column, *(row[number] for row in rows)))
        for number, column in enumerate(columns)
    ]
    narrowest = [widths[0], *(min(width, PROSE) for width in widths[1:])]
    if sum(narrowest) + 2 * len(columns) <= console.width:
        table = Table(title=title, title_justify="left", box=None, header_style="bold", show_header=any(columns))
        table.add_column(columns[0], no_wrap=True)
        for column, width in zip(columns[1:], narrowest[1:], strict=True):
            table.add_column(column, justify="right" if right else "left", overflow="fold", min_width=width)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    if title is not None:
        console.print(f"\n{title}", style="italic")
    for row in rows:
        console.print(row[0], style="bold")
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True)
        block.add_column(overflow="fold")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell != "":
                block.add_row(f"  {' '.join(column.split())}", cell)
        console.print(block)


def bytes_bar(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar of bytes."""
    return progress_bar(title, DownloadColumn())


@contextmanager
def progress_bar(title: str, count: ProgressColumn | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that updates the bar, which is on stdout or stderr, whichever is a terminal."""
    columns = (TextColumn(title), BarColumn(), count or MofNCompleteColumn(), TimeRemainingColumn())
    # On the console that prints the lines, if it can be, so that they appear above the bar.
    own = console if console.is_terminal else Console(stderr=True)
    with Progress(*columns, console=own, transient=True, disable=not own.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
