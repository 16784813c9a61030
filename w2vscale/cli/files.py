"""Files that commands write beside what they print."""

from __future__ import annotations

from pathlib import Path

from w2vscale.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folders above it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
