"""A cache of audio file headers on disk, so that a repeated or restarted command reads only files that changed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from w2vscale.errors import UserError


class Header(NamedTuple):
    """What was read from one audio file, by its path: below the folder, or absolute.

    `speech` is JSON with the channel that was listened to and the parts of the file that are speech; empty if these are
    not known.
    """

    file: str
    size: int  # bytes
    mtime_ns: int
    sampling_rate: int  # Hz
    channels: int
    samples: int  # per channel
    speech: str = ""


class HeaderCache:
    """The headers of the audio files of one folder, in an SQLite database.

    What `add` has stored survives a kill of the process. The cache starts empty if it is damaged or belongs to another
    folder. Raises UserError if it cannot be read or written, or if another process uses it.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        with self._errors():
            try:
                self._open(os.fsencode(folder))
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # not a database, or damaged
                self.close()
                path.unlink()
                self._open(os.fsencode(folder))

    def get(self, file: str) -> Header | None:
        """The header of a file, as it was when it was stored."""
        query = "SELECT size, mtime_ns, sampling_rate, channels, samples, speech FROM audio WHERE file = ?"
        with self._errors():
            found = self._database.execute(query, (os.fsencode(file),)).fetchone()
        usable = found and [*map(type, found)] == [int] * 5 + [str]  # or the file was changed by something else
        return Header(file, *found) if usable else None

    def add(self, headers: Iterable[Header]) -> None:
        """Store headers, replacing older ones of the same files."""
        rows = ((os.fsencode(file), *rest) for file, *rest in headers)
        with self._errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO audio VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def keep_only(self, files: Sequence[str]) -> None:
        """Remove the headers of all other files."""
        kept = set(map(os.fsencode, files))
        with self._errors(), self._database:
            stored = self._database.execute("SELECT file FROM audio").fetchall()
            removed = (row for row in stored if row[0] not in kept)
            self._database.executemany("DELETE FROM audio WHERE file = ?", removed)

    def close(self) -> None:
        self._database.close()

    def _open(self, folder: bytes) -> None:
        self._database = sqlite3.connect(self._path, timeout=0)
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        with self._database:
            self._database.execute("BEGIN EXCLUSIVE")
            if self._database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError
            self._database.execute("CREATE TABLE IF NOT EXISTS folder (path BLOB)")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS audio (file BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, "
                "sampling_rate INTEGER, channels INTEGER, samples INTEGER, speech TEXT)"
            )
            if self._database.execute("SELECT path FROM folder").fetchall() != [(folder,)]:
                self._database.execute("DELETE FROM audio")
                self._database.execute("DELETE FROM folder")
                self._database.execute("INSERT INTO folder VALUES (?)", (folder,))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorname", None) == "SQLITE_BUSY":
                raise UserError(f"{self._path}: another process is using it; wait until it has finished") from None
            raise UserError(f"{self._path}: cannot be written: {error}") from None
