"""What the headers of audio files said, kept on disk so that no header is read twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lhotse.cut import Cut

from w2vscale.errors import UserError

_START = '{"file": '


def journal_line(file: str, status: os.stat_result, cut: Cut) -> bytes:
    """What is remembered of one audio file: its path, size, time of change, and the cut of the whole of it."""
    return _stamp(file, status) + f'"cut": {json.dumps(cut.to_dict())}}}\n'.encode()


def describes(line: bytes, file: str, status: os.stat_result) -> bool:
    """Whether a line was written of the file as it is now."""
    return line.startswith(_stamp(file, status))


def _stamp(file: str, status: os.stat_result) -> bytes:
    stamp = {"file": file, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return json.dumps(stamp)[:-1].encode() + b", "


class HeaderJournal:
    """A line for each audio file of one folder, appended as headers are read, so that a killed run can go on.

    Holds the files' names and where their lines are, not the lines. A line that was not finished is dropped, and so
    are all lines of another folder.

    Raises:
        UserError: the journal cannot be read or written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._head = json.dumps({"folder": str(folder)}).encode() + b"\n"
        self._open()

    def line(self, file: str) -> bytes | None:
        """The newest line of a file, or None."""
        place = self._places.get(file)
        if place is None:
            return None
        self._file.seek(place)
        return self._file.readline()

    def append(self, lines: Iterable[tuple[str, bytes]]) -> None:
        """Add (file, line) pairs; once this returns they outlive this process.

        Raises:
            UserError: they cannot be written.
        """
        with writing(self._path):
            end = self._file.seek(0, os.SEEK_END)
            for file, line in lines:
                self._places[file] = end
                self._lines += 1
                end += self._file.write(line)
            self._file.flush()

    def keep_only(self, files: Sequence[str]) -> None:
        """Drop the lines of all but these files, which have one each, and lines that have a newer one.

        Raises:
            UserError: the journal cannot be written.
        """
        if len(files) == self._lines:
            return
        partial = self._path.with_name(self._path.name + ".partial")
        with writing(self._path):
            with partial.open("wb") as out:
                out.write(self._head)
                out.writelines(filter(None, map(self.line, files)))
            partial.replace(self._path)
            self.close()
            self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        self._places: dict[str, int] = {}
        self._lines = 0
        with writing(self._path):
            self._file = self._path.open("a+b")
            self._file.seek(0)
            if self._file.readline() != self._head:
                self._file.truncate(0)
                self._file.write(self._head)
                return
            end = len(self._head)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                with suppress(ValueError):  # a damaged line counts, as one to drop
                    file, _ = json.JSONDecoder().raw_decode(line.decode(), len(_START))
                    self._places[file] = end
                self._lines += 1
                end += len(line)
            self._file.truncate(end)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into one line that names the file.

    Raises:
        UserError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
