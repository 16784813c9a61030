"""What every bench has: a console that breaks no line of a table in a file, and errors of one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from w2vscale.errors import UserError

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with a line where something outside the program is wrong."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_script(main: Callable[..., Any]) -> None:
    """Call `main` with what the command line says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by an error: what has been started is ended
    with one_line_errors():
        typer.run(main)
