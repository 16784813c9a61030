"""Text on a terminal: names from files of strangers cannot command it."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control characters but tab and line feed. ESC among them begins the commands of a terminal."""


def visible(text: str) -> str:
    r"""`text` with its control characters written out, as `\u001b`: JSON stays JSON."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class VisibleConsole(Console):
    """A console that shows all strings as `visible`. Texts with styles are made by the program alone."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Called for every string that is printed, also in the cells of tables."""
        return super().render_str(visible(text), **options)
