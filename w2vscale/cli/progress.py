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


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[RenderableType]], *, title: str | None = None, right: bool = True
) -> None:
    """Print a table. The first column is aligned to the left and the others to the right, if `right`."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", show_header=any(columns))
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def bytes_bar(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar of bytes."""
    return progress_bar(title, DownloadColumn())


@contextmanager
def progress_bar(title: str, count: ProgressColumn | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that updates the bar. Prints nothing unless stderr is a terminal."""
    columns = (TextColumn(title), BarColumn(), count or MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
