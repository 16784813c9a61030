"""Files: names like a missing one, text of any encoding, atomic writes, logs of JSON records, safetensors headers."""

from __future__ import annotations

import codecs
import difflib
import errno
import json
import math
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from w2vscale.errors import UserError

LARGEST_COUNT = 2**53  # of updates or hours in a log; a larger one is damaged
LONGEST_LINE = 2**24  # bytes of a line of a log; a longer one is damaged
NAMES_COMPARED = 2000  # of a folder, in the search for a name like one that does not exist

# Bytes per value of the types that safetensors files name.
BYTES_OF = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def regular(path: Path | str, flags: int) -> int:
    """An opener for `open` that refuses what is not a file, such as a FIFO, which would wait for ever. OSError if so.

    It does not write through a link: in a folder from a stranger, a link may lead to any file of the user.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a file", str(path))


def nearest_path(path: Path | str) -> str:
    """Return `; did you mean X?` for the existing path that is closest to one that does not exist; "" if none is close.

    X has another name in place of the first part of `path` that does not exist.
    """
    path = Path(path)
    missing = next((part for part in (*reversed(path.parents), path) if not os.path.lexists(part)), None)
    if missing is None:
        return ""
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, NAMES_COMPARED)]
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75):
        found = missing.with_name(name)
        whole = found / path.relative_to(missing)
        return f"; did you mean {whole if os.path.lexists(whole) else found}?"
    return ""


def read_text(path: Path | str, *, encoding: str | None = None) -> str:
    """The text of a file that a person or another program has written, without a byte-order mark.

    It is UTF-8, or UTF-16 or UTF-32, which are recognised by their byte-order mark or, for UTF-16, by their zero bytes.
    `encoding` names another one. Raises OSError if the file cannot be read, and UserError, naming file and line, if it
    is not text in this encoding.
    """
    with open(path, "rb", opener=regular) as file:
        content = file.read()
    encoding = encoding or _encoding_of(content)
    try:
        text = content.decode(encoding)
    except LookupError:
        raise UserError(f"{path}: no encoding has the name {encoding!r}; try for example latin-1 or cp1252") from None
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].decode(encoding, errors="replace").count("\n")
        found = "ends in the middle of a character" if error.start >= len(content) - 1 else ""
        found = found or f"byte 0x{content[error.start]:02x} at column {_column(content, error.start)}"
        raise UserError(
            f"{path}: line {line} is not {encoding.removesuffix('-sig').upper()} ({found}); convert the file, for "
            "example with: iconv -f LATIN1 -t UTF-8"
        ) from None
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise UserError(f"{path}: line {1 + text[: text.index(chr(0))].count(chr(10))} has a zero byte: it is not text")
    return text


def _encoding_of(content: bytes) -> str:
    """The encoding that the first bytes show; UTF-8 if they show none."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    for mark, encoding in marks.items():
        if content.startswith(mark):
            return encoding
    # In UTF-16, line ends and spaces have a zero byte, whatever the script. Text in UTF-8 has none.
    if 0 in content and len(content) % 2 == 0:
        return "utf-16-be" if content[0::2].count(0) > content[1::2].count(0) else "utf-16-le"
    return "utf-8"


def _column(content: bytes, at: int) -> int:
    """The column of the byte `at` in its line of UTF-8, counted in characters from 1."""
    start = content.rfind(b"\n", 0, at) + 1
    return 1 + len(content[start:at].decode(errors="replace"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any OSError in the block into a UserError: one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def new_file(path: Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO[Any]]:
    """Open a file that appears at `path` when the block ends without an error, and replaces one that is there.

    Makes the folders above it. `durable`: its content is on disk before it gets its name. Raises UserError if it
    cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a whole UTF-8 file; see `new_file`."""
    with new_file(path, durable=durable) as file:
        file.write(text)


def remove_partials(folder: Path, log: Callable[[str], None]) -> None:
    """Delete the unfinished files and folders that killed processes left in `folder`. A failure is only logged.

    No other process may write there. Files that a thread of this one writes (see `new_file`) stay.
    """
    for path in folder.glob(".*.partial"):
        if path.name.endswith(f".{os.getpid()}.partial"):
            continue
        try:
            delete(path)
        except OSError as failure:
            log(f"{path}: cannot be deleted: {failure}")


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it. OSError if it cannot be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects to a log, one per line. A line that an earlier process left incomplete is ended first.

    Raises UserError if it cannot be written.
    """
    with writing(path), open(path, "a+b", opener=regular) as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
            if log.read() != b"\n":
                log.write(b"\n")
        log.write("".join(json.dumps(record) + "\n" for record in records).encode())


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a log, and the number of other lines, such as one that a killed process left incomplete.

    Raises OSError if the file cannot be read.
    """
    records, lines = [], 0
    with open(path, "rb", opener=regular) as file:
        while line := file.readline(LONGEST_LINE):
            lines += 1
            with suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line.decode(errors="replace")), dict):
                    records.append(record)
    return records, lines - len(records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log; other lines are skipped. Raises OSError if the file cannot be read."""
    return read_log(path)[0]


def read_metrics(path: Path, split: str) -> list[dict[str, Any]]:
    """Read one split (`train`, `validation`, `validation_NAME` or `roll_back`) of a metrics.jsonl.

    Lines that no run has written are skipped. Raises UserError if the file cannot be read.
    """
    try:
        records = read_records(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{nearest_path(path)}") from None
    return [record for record in records if record.get("split") == split and _are_metrics(record)]


def _are_metrics(record: Mapping[str, Any]) -> bool:
    values = [value for key, value in record.items() if key != "split" and value is not None]
    # math.isfinite raises for an integer that no float can hold.
    finite = (type(one) in (int, float) and abs(one) <= sys.float_info.max for one in values)
    if not (type(record.get("update")) is int and all(finite)):
        return False
    return all(0 <= (record.get(key) or 0) <= LARGEST_COUNT for key in ("update", "hours_seen"))


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file begins with, before the values of `tensors` (type and shape by name) in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES_OF[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    return struct.pack("<Q", len(text)) + text
