"""Build the index of a cut manifest, in parallel, and extend it when lines were appended to the manifest."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.corpora.parallel import Progress, no_progress, parallel_map
from w2vscale.data.manifest import INDEX_DTYPE, check_manifest, index_path, language_of, open_index
from w2vscale.errors import UserError
from w2vscale.files import new_file

MAX_LANGUAGES = 65_535
RANGE_BYTES = 64 * 2**20
"""Bytes of a manifest that one process parses at a time."""

PARSED_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<i8")])
"""As INDEX_DTYPE, with room for any number of languages."""


def build_index(manifest: Path, progress: Progress = no_progress, *, jobs: int = 1) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    If the existing index describes the beginning of the manifest, byte for byte by its checksum, only the lines after
    this beginning are parsed. `progress` counts bytes. Raises UserError if the manifest is missing, compressed or
    empty, has a line that is not a cut or too many languages, or if the index cannot be written.
    """
    size = check_manifest(manifest)
    parts, names = _indexed_beginning(manifest, size)
    checksum, done = (int(parts[0]["duration"][-1]), int(parts[0]["offset"][-1])) if parts else (0, 0)
    progress(done, size)
    if done == size:
        return int(parts[0].size) - 1
    parts = [part[:-1] for part in parts]
    numbers = {name: number for number, name in enumerate(names)}
    step = min(RANGE_BYTES, -(-(size - done) // jobs))
    ranges = [(start, min(start + step, size)) for start in range(done, size, step)]
    try:
        parsed = parallel_map(partial(_parse, manifest), ranges, jobs=min(jobs, len(ranges)), source=manifest)
        for (start, end), (part, found) in zip(ranges, parsed, strict=True):
            codes = np.array([numbers.setdefault(name, len(numbers)) for name in found], np.int64)
            if len(numbers) > MAX_LANGUAGES:
                raise UserError(f"{manifest}: has more than {MAX_LANGUAGES} languages, the most that an index can hold")
            part["language"] = codes[part["language"]]
            parts.append(part.astype(INDEX_DTYPE))
            checksum = _checksum(manifest, start, end, checksum)
            progress(end, size)
    except _NotACut as error:
        number = 1 + sum(block.count(b"\n") for block in _blocks(manifest, 0, error.args[0]))
        raise UserError(
            f"{manifest}: line {number} is not a Lhotse cut of a recording with a duration above zero"
        ) from None
    index = np.concatenate([*parts, np.array([(size, checksum, 0)], INDEX_DTYPE)])
    if index.size == 1:
        raise UserError(f"{manifest}: the manifest is empty")
    with new_file(index_path(manifest), "wb") as file:
        np.save(file, index)
    return index.size - 1


class _NotACut(ValueError):
    """The line that begins at the byte `args[0]` is not a cut."""


def _parse(manifest: Path, limits: tuple[int, int]) -> tuple[NDArray[np.void], list[str]]:
    """Records of the lines that begin within a range of bytes; languages are numbered within the range."""
    offset, end = limits
    records: list[tuple[int, float, int]] = []
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
                    duration, language = _duration_and_language(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    raise _NotACut(offset) from None
                records.append((offset, duration, numbers.setdefault(language, len(numbers))))
            offset += len(line)
    return np.array(records, PARSED_DTYPE), list(numbers)


def _duration_and_language(cut: dict[str, Any]) -> tuple[float, str]:
    duration = float(cut["duration"])
    if "Cut" not in cut["type"] or not 0.0 < duration < math.inf or not cut["recording"]["sources"]:
        raise ValueError
    return duration, language_of(cut)


def _indexed_beginning(manifest: Path, size: int) -> tuple[list[NDArray[np.void]], list[str]]:
    """The existing index and its language names if it describes the beginning of the manifest, otherwise nothing."""
    try:
        index = open_index(manifest)
    except UserError:
        return [], []
    end = int(index["offset"][-1])
    with manifest.open("rb") as file:
        if not 0 < end <= size or (end < size and os.pread(file.fileno(), 1, end - 1) != b"\n"):
            return [], []
        if _checksum(manifest, 0, end) != index["duration"][-1]:
            return [], []
        names = []
        for number in np.unique(index["language"][:-1], return_index=True)[1]:
            file.seek(int(index["offset"][number]))
            names.append(language_of(json.loads(file.readline())))
    return [index], names


def _checksum(path: Path, start: int, end: int, value: int = 0) -> int:
    """CRC-32 of a range of bytes, continued from `value`, the checksum of the bytes before it."""
    for block in _blocks(path, start, end):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(2**20, end - file.tell())):
            yield block
