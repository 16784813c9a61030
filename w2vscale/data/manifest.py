"""Lhotse cut manifests with O(1) random access: an index of offsets and durations beside each JSONL file."""

from __future__ import annotations

import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from numpy.typing import NDArray

from w2vscale.corpora.parallel import parallel_map
from w2vscale.errors import UserError

INDEX_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<u2")])
"""Byte offset of a cut's line, seconds, and its language: numbered from 0 in order of first appearance.

One more record follows the last cut's: the manifest's size in bytes, and its CRC-32 for a duration.
"""

MAX_LANGUAGES = 65_535
RANGE_BYTES = 64 * 2**20
"""Of a manifest, what one process parses at a time."""

Read = TypeVar("Read")
_decode = json.JSONDecoder().raw_decode


def index_path(manifest: Path) -> Path:
    """Where the index of a manifest lies."""
    return manifest.with_name(manifest.name + ".index.npy")


def build_index(manifest: Path, progress: Callable[[int, int], None] | None = None, *, jobs: int = 1) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    `jobs` processes parse the manifest. Where its beginning is what an index describes already, byte for byte by
    its checksum, only the lines after that are parsed. `progress` is called with (bytes done, bytes in all).

    Raises:
        UserError: the manifest is missing, compressed, empty, or has a line that is not a cut or too many
            languages; the index cannot be written.
    """
    size = _check_manifest(manifest)
    pieces, names = _indexed_beginning(manifest, size)
    checksum, done = (int(pieces[0]["duration"][-1]), int(pieces[0]["offset"][-1])) if pieces else (0, 0)
    if progress is not None:
        progress(done, size)
    if done == size:
        return int(pieces[0].size) - 1
    pieces = [piece[:-1] for piece in pieces]
    numbers = {name: number for number, name in enumerate(names)}
    step = min(RANGE_BYTES, -(-(size - done) // jobs))
    ranges = [(start, min(start + step, size)) for start in range(done, size, step)]
    try:
        parsed = parallel_map(partial(_parse, manifest), ranges, jobs=min(jobs, len(ranges)), source=manifest)
        for (_, end), (records, found) in zip(ranges, parsed, strict=True):
            codes = np.array([numbers.setdefault(name, len(numbers)) for name in found], np.int64)
            if len(numbers) > MAX_LANGUAGES:
                raise UserError(f"{manifest}: has more than {MAX_LANGUAGES} languages, the most that an index holds")
            piece = np.empty(len(records), INDEX_DTYPE)
            piece["offset"], piece["duration"] = records["offset"], records["duration"]
            piece["language"] = codes[records["language"]]
            pieces.append(piece)
            checksum = _checksum(manifest, done, end, checksum)
            done = end
            if progress is not None:
                progress(done, size)
    except _NotACut as error:
        number = _lines_before(manifest, error.offset) + 1
        raise UserError(
            f"{manifest}: line {number} is not a Lhotse cut of a recording with a duration above zero"
        ) from None
    count = sum(piece.size for piece in pieces)
    if not count:
        raise UserError(f"{manifest}: the manifest is empty")
    _write_index(index_path(manifest), [*pieces, np.array([(size, checksum, 0)], INDEX_DTYPE)])
    return count


class Manifest:
    """An indexed cut manifest, opened without being read.

    Raises:
        UserError: the manifest or its index is missing, or the index belongs to another version of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = _check_manifest(path)
        remake = f"remake with: w2vscale data index {path}"
        try:
            self._index = np.lib.format.open_memmap(index_path(path), mode="r")
        except FileNotFoundError:
            raise UserError(f"{path}: no index beside it; make one with: w2vscale data index {path}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{index_path(path)}: not an index ({error}); {remake}") from None
        if self._index.dtype != INDEX_DTYPE or self._index.size < 2:
            raise UserError(f"{index_path(path)}: not an index as this version of w2vscale makes it; {remake}")
        if int(self._index["offset"][-1]) != size:
            raise UserError(f"{path}: changed since it was indexed; {remake}")
        # Held open: it stays the file that was indexed, whatever takes its name. Reads have no shared position,
        # so that forked loader processes can share it.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return int(self._index.size) - 1

    @property
    def durations(self) -> NDArray[np.float64]:
        """Seconds of each utterance."""
        return self._index["duration"][:-1]

    @property
    def checksum(self) -> int:
        """CRC-32 of the file."""
        return int(self._index["duration"][-1])

    def languages(self) -> tuple[NDArray[np.uint16], list[str]]:
        """The language of each utterance as a number, and the languages by number; "" where a cut has none.

        Raises:
            UserError: a line that has to be read for a name does not hold a cut.
        """
        codes = self._index["language"][:-1]
        # A line is read for each, since names of no fixed length have no place in the index.
        return codes, [self._read(number, language_of) for number in _first_of_each(codes)]

    def cut(self, number: int) -> Cut:
        """Utterance `number`, read from its line alone.

        Raises:
            UserError: the line does not hold a cut.
        """
        return self._read(number, deserialize_item)

    def _read(self, number: int, convert: Callable[[dict[str, Any]], Read]) -> Read:
        start, end = (int(offset) for offset in self._index["offset"][number : number + 2])
        line = os.pread(self._descriptor, end - start, start)
        try:
            return convert(json.loads(line))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.path}: utterance {number} is not a Lhotse cut ({reason})") from None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


class Corpus:
    """Several manifests as one numbered sequence of utterances."""

    def __init__(self, paths: Sequence[Path], *, setting: str = "data.train") -> None:
        if not paths:
            raise UserError(f"{setting} names no manifest: set {setting}=CUTS.jsonl")
        self.manifests = [Manifest(Path(path)) for path in paths]
        self._starts = np.cumsum([0, *(len(manifest) for manifest in self.manifests)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def hours(self) -> float:
        """Of all utterances, whole."""
        return float(sum(manifest.durations.sum() for manifest in self.manifests)) / 3600

    @property
    def fingerprint(self) -> str:
        """What tells these manifests from others, wherever they lie."""
        return "-".join(f"{manifest.checksum:08x}" for manifest in self.manifests)

    def samples(self, sampling_rate: int) -> NDArray[np.int64]:
        """Length of each utterance in samples at `sampling_rate` (Hz)."""
        durations = np.concatenate([manifest.durations for manifest in self.manifests])
        return np.rint(durations * sampling_rate).astype(np.int64)

    def cut(self, number: int) -> Cut:
        """Utterance `number`."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.manifests[which].cut(number - int(self._starts[which]))


def audio_path(cut: Cut) -> str:
    """The file an utterance's audio is in, its shard, or the kind of source it comes from."""
    source = cut.recording.sources[0]
    return str(source.source) if source.type == "file" else str((cut.custom or {}).get("shard_origin", source.type))


def _check_manifest(path: Path) -> int:
    """The manifest's size in bytes."""
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read: permission denied")
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: an indexed manifest is uncompressed JSONL (*.jsonl); convert: lhotse copy {path} …")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the manifest is empty")
    return size


class _NotACut(ValueError):
    """The line that begins at a byte offset."""

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
    if text[end:] != "\n":  # json.loads knows the rest: other encodings and white space, and what is wrong
        cut = json.loads(line)
    duration = float(cut["duration"])
    if "Cut" not in cut["type"] or not 0.0 < duration < math.inf or not cut["recording"]["sources"]:
        raise ValueError
    return duration, language_of(cut)


def language_of(cut: dict[str, Any]) -> str:
    """A cut's language: its first supervision's, or its custom field `language`, or ""."""
    supervisions, custom = cut.get("supervisions"), cut.get("custom")
    language = supervisions[0].get("language") if supervisions else None
    if language is None and custom:
        language = custom.get("language")
    return "" if language is None else str(language)


def _first_of_each(codes: NDArray[np.uint16]) -> list[int]:
    """Where each number from 0 to the largest first appears; they appear in order."""
    so_far = np.maximum.accumulate(codes)
    return [int(place) for place in np.searchsorted(so_far, np.arange(int(so_far[-1]) + 1, dtype=codes.dtype))]


def _indexed_beginning(manifest: Path, size: int) -> tuple[list[NDArray[np.void]], list[str]]:
    """The index of what is still the manifest's beginning, and its languages' names; or nothing."""
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
        for number in _first_of_each(index["language"][:-1]):
            file.seek(int(index["offset"][number]))
            names.append(language_of(json.loads(file.readline())))
    return [index], names


def _checksum(path: Path, start: int, end: int, value: int = 0) -> int:
    """CRC-32 of a range of bytes, continued from that of what is before it."""
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


def _write_index(target: Path, pieces: Sequence[NDArray[np.void]]) -> None:
    partial_index = target.with_name(f"{target.name}.{os.getpid()}.partial")
    description = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (sum(piece.size for piece in pieces),),
    }
    try:
        with partial_index.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, description)
            for piece in pieces:
                out.write(piece.tobytes())
        partial_index.replace(target)
    except OSError as error:
        partial_index.unlink(missing_ok=True)
        raise UserError(f"{target}: the index cannot be written: {error.strerror}") from None
