"""The console, counts in words, and a progress bar for long steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Wide, so that tables in a file or a pipe are not cut to 80 columns.
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)

show = partial(console.print, markup=False)
"""Print a line in which square brackets are text."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 utterance", "24 utterances", "2 micro-batches"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('ch') else 's'}"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that updates the bar. Prints nothing unless stderr is a terminal."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
