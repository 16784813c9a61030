"""Build the index of a cut manifest, in parallel, and extend it when lines were appended to the manifest."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w2vscale.corpora.parallel import parallel_map
from w2vscale.data.manifest import INDEX_DTYPE, check_manifest, first_of_each, index_path, language_of
from w2vscale.errors import UserError
from w2vscale.files import new_file

MAX_LANGUAGES = 65_535
RANGE_BYTES = 64 * 2**20
"""Bytes of a manifest that one process parses at a time."""

_decode = json.JSONDecoder().raw_decode


def build_index(manifest: Path, progress: Callable[[int, int], None] | None = None, *, jobs: int = 1) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    `jobs` processes parse the manifest. If the existing index describes the beginning of the manifest, byte for byte
    by its checksum, only the lines after this beginning are parsed. `progress` is called with (bytes done, total
    bytes).

    Raises:
        UserError: the manifest is missing, compressed or empty, has a line that is not a cut or too many languages;
            the index cannot be written.
    """
    size = check_manifest(manifest)
    parts, names = _indexed_beginning(manifest, size)
    checksum, done = (int(parts[0]["duration"][-1]), int(parts[0]["offset"][-1])) if parts else (0, 0)
    if progress is not None:
        progress(done, size)
    if done == size:
        return int(parts[0].size) - 1
    parts = [part[:-1] for part in parts]
    numbers = {name: number for number, name in enumerate(names)}
    step = min(RANGE_BYTES, -(-(size - done) // jobs))
    ranges = [(start, min(start + step, size)) for start in range(done, size, step)]
    try:
        parsed = parallel_map(partial(_parse, manifest), ranges, jobs=min(jobs, len(ranges)), source=manifest)
        for (_, end), (records, found) in zip(ranges, parsed, strict=True):
            codes = np.array([numbers.setdefault(name, len(numbers)) for name in found], np.int64)
            if len(numbers) > MAX_LANGUAGES:
                raise UserError(f"{manifest}: has more than {MAX_LANGUAGES} languages, the most that an index can hold")
            part = np.empty(len(records), INDEX_DTYPE)
            part["offset"], part["duration"] = records["offset"], records["duration"]
            part["language"] = codes[records["language"]]
            parts.append(part)
            checksum = _checksum(manifest, done, end, checksum)
            done = end
            if progress is not None:
                progress(done, size)
    except _NotACut as error:
        number = _lines_before(manifest, error.offset) + 1
        raise UserError(
            f"{manifest}: line {number} is not a Lhotse cut of a recording with a duration above zero"
        ) from None
    count = sum(part.size for part in parts)
    if not count:
        raise UserError(f"{manifest}: the manifest is empty")
    _write_index(index_path(manifest), [*parts, np.array([(size, checksum, 0)], INDEX_DTYPE)])
    return count


class _NotACut(ValueError):
    """The line that begins at byte `offset` is not a cut."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def _parse(manifest: Path, limits: tuple[int, int]) -> tuple[NDArray[np.void], list[str]]:
    """Records of the lines that begin within a range of bytes; languages are numbered within the range."""
    offset, end = limits
    offsets: list[int] = []
    durations: list[float] = []
    codes: list[int] = []
    numbers: dict[str, int] = {}
    with manifest.open("rb", buffering=2**20) as lines:
        if offset:
            lines.seek(offset - 1)
            offset += len(lines.readline()) - 1
        for line in lines:
            if offset >= end:
                break
            if not line.isspace():
                try:
                    duration, language = _duration_and_language(line)
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    raise _NotACut(offset) from None
                offsets.append(offset)
                durations.append(duration)
                codes.append(numbers.setdefault(language, len(numbers)))
            offset += len(line)
    records = np.empty(len(offsets), np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<u4")]))
    records["offset"], records["duration"], records["language"] = offsets, durations, codes
    return records, list(numbers)


def _duration_and_language(line: bytes) -> tuple[float, str]:
    try:
        text = line.decode()
        cut, end = _decode(text)
    except ValueError:
        text, end = "", 0
    if text[end:] != "\n":  # json.loads is slower, but handles other encodings and white space, and reports errors
        cut = json.loads(line)
    duration = float(cut["duration"])
    if "Cut" not in cut["type"] or not 0.0 < duration < math.inf or not cut["recording"]["sources"]:
        raise ValueError
    return duration, language_of(cut)


def _indexed_beginning(manifest: Path, size: int) -> tuple[list[NDArray[np.void]], list[str]]:
    """The existing index and its language names if it describes the beginning of the manifest, otherwise nothing."""
    try:
        index = np.lib.format.open_memmap(index_path(manifest), mode="r")
    except (OSError, ValueError):
        return [], []
    if index.dtype != INDEX_DTYPE or index.size < 2:
        return [], []
    end = int(index["offset"][-1])
    with manifest.open("rb") as file:
        if not 0 < end <= size or (end < size and os.pread(file.fileno(), 1, end - 1) != b"\n"):
            return [], []
        if _checksum(manifest, 0, end) != index["duration"][-1]:
            return [], []
        names = []
        for number in first_of_each(index["language"][:-1]):
            file.seek(int(index["offset"][number]))
            names.append(language_of(json.loads(file.readline())))
    return [index], names


def _checksum(path: Path, start: int, end: int, value: int = 0) -> int:
    """CRC-32 of a range of bytes, continued from `value`, the checksum of the bytes before it."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(2**20, end - file.tell())):
            value = zlib.crc32(block, value)
    return value


def _lines_before(path: Path, end: int) -> int:
    count = 0
    with path.open("rb") as file:
        while block := file.read(min(2**20, end - file.tell())):
            count += block.count(b"\n")
    return count


def _write_index(path: Path, parts: Sequence[NDArray[np.void]]) -> None:
    description = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (sum(part.size for part in parts),),
    }
    with new_file(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, description)
        for part in parts:
            file.write(part.tobytes())
