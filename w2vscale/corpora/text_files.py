"""Read text files of a corpus, in any encoding of Unicode or in one that is named."""

from __future__ import annotations

from pathlib import Path

from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_text


def text_of_file(path: Path, *, encoding: str | None = None) -> str:
    """Like `files.read_text`, but raises UserError also if the file cannot be read."""
    try:
        return read_text(path, encoding=encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{nearest_path(path)}") from None


def lines_of_file(path: Path, *, encoding: str | None = None, strip: bool = True) -> list[str]:
    """The lines of a text file, without the white space around them if `strip`. UserError like `text_of_file`.

    Only line feeds end a line, also after a carriage return. Python's `splitlines` also splits at characters such as
    U+2028, which occur inside transcripts.
    """
    lines = text_of_file(path, encoding=encoding).split("\n")
    lines = [line.strip() if strip else line.removesuffix("\r") for line in lines]
    return lines[:-1] if lines[-1] == "" else lines
