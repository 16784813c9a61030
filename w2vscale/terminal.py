"""Text on a terminal: names from files of strangers cannot command it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control characters but tab and line feed. ESC among them begins the commands of a terminal."""


def visible(text: str) -> str:
    r"""`text` with its control characters written out, as `\u001b`: JSON stays JSON."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class LastingOutput:
    """Standard output that is given up once it cannot be written: its reader has ended, or the disk is full.

    So a run goes on without it. `given_up` is called once, with the reason.
    """

    def __init__(self, given_up: Callable[[str], None]) -> None:
        self._given_up = given_up
        self._lost = False

    def write(self, text: str) -> int:
        """Write a text, as long as it goes."""
        try:
            self._try(lambda: self._stream.write(text))
        except UnicodeEncodeError as error:  # its encoding has no such character
            escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(lambda: self._stream.write(escaped))
        return len(text)

    def flush(self) -> None:
        """Flush, as long as it goes."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Its file descriptor."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """Its encoding."""
        return self._stream.encoding

    @property
    def _stream(self) -> TextIO:
        stream: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # under a progress bar
        return stream

    def _try(self, write: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            write()
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:  # ValueError: closed
            self._lost = True
            with suppress(OSError, ValueError):  # what is still buffered must not fail when the process ends
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, self._stream.fileno())
                os.close(descriptor)
            self._given_up(getattr(error, "strerror", None) or str(error))


class VisibleConsole(Console):
    """A console that shows all strings as `visible`. Texts with styles are made by the program alone."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Called for every string that is printed, also in the cells of tables."""
        return super().render_str(visible(text), **options)
