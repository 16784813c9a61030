"""Build the index of a cut manifest, in parallel, and extend it when lines were appended to the manifest."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from w2vscale.corpora.parallel import Progress, no_progress, parallel_map
from w2vscale.data.cuts import FILES, NotACut, read_cut
from w2vscale.data.manifest import (
    INDEX_DTYPE,
    check_manifest,
    index_path,
    index_url,
    language_of,
    local_manifest,
    naming,
    open_index,
)
from w2vscale.errors import UserError
from w2vscale.files import new_file
from w2vscale.storage.objects import upload
from w2vscale.storage.urls import Url

MAX_LANGUAGES = 65_535
RANGE_BYTES = 64 * 2**20  # of a manifest that one process parses at a time
PARSED_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<i8")])  # any number of languages

NOT_A_CUT, REFUSED = math.nan, -math.inf  # as the duration of a line


def build_index(
    manifest: Path | Url, progress: Progress = no_progress, *, jobs: int = 1, schemes: Collection[str] = FILES
) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    If the existing index describes the beginning of the manifest, byte for byte by its checksum, only the lines after
    this beginning are parsed. `progress` counts bytes. `schemes`: the setting `data.url_schemes`. Raises UserError if
    the manifest is missing, compressed or empty, has a line that is not a cut, audio that is not where `schemes` allow
    it, or too many languages, or if the index cannot be written.
    """
    local = local_manifest(manifest)
    with naming(local, manifest):
        count = index_lines(local, progress, jobs=jobs, schemes=schemes).size - 1
    if isinstance(manifest, Url):
        upload(index_path(local), index_url(manifest))
    return count


def index_lines(
    manifest: Path,
    progress: Progress = no_progress,
    *,
    jobs: int = 1,
    keep_unusable: bool = False,
    schemes: Collection[str] = FILES,
) -> NDArray[np.void]:
    """Like `build_index`, but returns the index.

    With `keep_unusable`, lines that are not cuts are in it with the duration NaN, and then it is not written. A file
    without any cut raises UserError even so.
    """
    size = check_manifest(manifest)
    content = np.memmap(manifest, np.uint8, "r", shape=(size,))
    old, languages = _reusable_index(manifest, content, schemes)
    done, checksum = int(old["offset"][-1]), int(old["duration"][-1])
    progress(done, size)
    if done == size:
        return old
    parts = [old[:-1]]
    numbers = {name: number for number, name in enumerate(languages)}
    step = min(RANGE_BYTES, -(-(size - done) // jobs))
    ranges = [(start, min(start + step, size)) for start in range(done, size, step)]
    parsed = parallel_map(partial(_parse, manifest, schemes), ranges, jobs=min(jobs, len(ranges)), source=manifest)
    for (start, end), (part, found) in zip(ranges, parsed, strict=True):
        refused = part["duration"] == REFUSED if keep_unusable else ~np.isfinite(part["duration"])
        if refused.any():
            _raise_error_of(manifest, content, int(part["offset"][refused.argmax()]), schemes)
        codes = np.array([numbers.setdefault(name, len(numbers)) for name in found], np.int64)
        if len(numbers) > MAX_LANGUAGES:
            raise UserError(f"{manifest}: has more than {MAX_LANGUAGES} languages, the most that an index can hold")
        part["language"] = codes[part["language"]]
        parts.append(part.astype(INDEX_DTYPE))
        checksum = zlib.crc32(content[start:end].data, checksum)
        progress(end, size)
    index = np.concatenate([*parts, np.array([(size, checksum, 0)], INDEX_DTYPE)])
    if index.size == 1:
        raise UserError(f"{manifest}: the manifest is empty")
    unusable = np.isnan(index["duration"][:-1])
    if unusable.all():  # a file of another kind
        _raise_error_of(manifest, content, int(index["offset"][0]), schemes)
    if not unusable.any():
        with new_file(index_path(manifest), "wb") as file:
            np.save(file, index)
    return index


def _raise_error_of(manifest: Path, content: NDArray[np.uint8], offset: int, schemes: Collection[str]) -> NoReturn:
    """Raise the error of the unusable line that begins at the byte `offset`."""
    before = np.array_split(content[:offset], 1 + offset // 2**20)
    number = 1 + sum(np.count_nonzero(block == ord("\n")) for block in before)
    with manifest.open("rb") as lines:
        lines.seek(offset)
        read_cut(lines.readline(), where=f"{manifest}: line {number}", schemes=schemes)
    raise UserError(f"{manifest}: line {number} changed while it was read")


def _parse(manifest: Path, schemes: Collection[str], limits: tuple[int, int]) -> tuple[NDArray[np.void], list[str]]:
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
                duration, language = _duration_and_language(line, schemes)
                records.append((offset, duration, numbers.setdefault(language, len(numbers))))
            offset += len(line)
    return np.array(records, PARSED_DTYPE), list(numbers)


def _duration_and_language(line: bytes, schemes: Collection[str]) -> tuple[float, str]:
    try:
        cut = read_cut(line, where="", schemes=schemes)
    except NotACut:
        return NOT_A_CUT, ""
    except UserError:
        return REFUSED, ""
    return cut["duration"], language_of(cut)


def _reusable_index(
    manifest: Path, content: NDArray[np.uint8], schemes: Collection[str]
) -> tuple[NDArray[np.void], list[str]]:
    """The existing index and its languages if it describes the beginning of a manifest, otherwise that of no lines."""
    try:
        index = open_index(manifest)
        end = int(index["offset"][-1])
        whole_lines = end == content.size or (0 < end < content.size and content[end - 1] == ord("\n"))
        if whole_lines and zlib.crc32(content[:end].data) == index["duration"][-1]:
            return index, _languages(manifest, index[:-1], schemes)
    except UserError:
        pass
    return np.zeros(1, INDEX_DTYPE), []


def _languages(manifest: Path, records: NDArray[np.void], schemes: Collection[str]) -> list[str]:
    """Language names by number, each from the first line that has it. Raises UserError if it is not a cut."""
    names = []
    with manifest.open("rb") as file:
        for number in np.unique(records["language"], return_index=True)[1]:
            file.seek(int(records["offset"][number]))
            names.append(language_of(read_cut(file.readline(), where=str(manifest), schemes=schemes)))
    return names
