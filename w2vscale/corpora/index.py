"""Build the index of a cut manifest, in parallel, and extend it when lines were appended to the manifest."""

from __future__ import annotations

import json
import math
import zlib
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
RANGE_BYTES = 64 * 2**20  # of a manifest that one process parses at a time
PARSED_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<i8")])  # any number of languages


def build_index(manifest: Path, progress: Progress = no_progress, *, jobs: int = 1) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    If the existing index describes the beginning of the manifest, byte for byte by its checksum, only the lines after
    this beginning are parsed. `progress` counts bytes. Raises UserError if the manifest is missing, compressed or
    empty, has a line that is not a cut or too many languages, or if the index cannot be written.
    """
    size = check_manifest(manifest)
    content = np.memmap(manifest, np.uint8, "r", shape=(size,))
    old = _reusable_index(manifest, content)
    done, checksum = int(old["offset"][-1]), int(old["duration"][-1])
    progress(done, size)
    if done == size:
        return old.size - 1
    parts = [old[:-1]]
    numbers = {name: number for number, name in enumerate(_languages(manifest, parts[0]))}
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
            checksum = zlib.crc32(content[start:end].data, checksum)
            progress(end, size)
    except _NotACut as error:
        before = np.array_split(content[: error.args[0]], 1 + error.args[0] // 2**20)
        number = 1 + sum(np.count_nonzero(block == ord("\n")) for block in before)
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


def _reusable_index(manifest: Path, content: NDArray[np.uint8]) -> NDArray[np.void]:
    """The existing index if it describes the beginning of a manifest, otherwise the index of no lines."""
    try:
        index = open_index(manifest)
    except UserError:
        return np.zeros(1, INDEX_DTYPE)
    end = int(index["offset"][-1])
    whole_lines = end == content.size or (0 < end < content.size and content[end - 1] == ord("\n"))
    same = whole_lines and zlib.crc32(content[:end].data) == index["duration"][-1]
    return index if same else np.zeros(1, INDEX_DTYPE)


def _languages(manifest: Path, records: NDArray[np.void]) -> list[str]:
    """Language names by number, each from the first line that has it."""
    names = []
    with manifest.open("rb") as file:
        for number in np.unique(records["language"], return_index=True)[1]:
            file.seek(int(records["offset"][number]))
            names.append(language_of(json.loads(file.readline())))
    return names
