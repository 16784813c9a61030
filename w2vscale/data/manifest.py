"""Lhotse cut manifests with O(1) random access: an index of offsets and durations beside each JSONL file."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from numpy.typing import NDArray

from w2vscale.errors import UserError

INDEX_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8")])


def index_path(manifest: Path) -> Path:
    """Where the index of a manifest lies."""
    return manifest.with_name(manifest.name + ".index.npy")


def build_index(manifest: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the index of an uncompressed JSONL cut manifest beside it; returns the number of utterances.

    One record (byte offset, duration in seconds) per cut, then one whose offset is the file's size.
    `progress` is called with (bytes read, bytes in all).

    Raises:
        UserError: the manifest is missing, compressed, empty, or has a line that is not a cut.
    """
    size = _check_manifest(manifest)
    records: list[tuple[int, float]] = []
    offset = 0
    with manifest.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append((offset, _duration_of(line, manifest, number)))
            offset += len(line)
            if progress is not None and number % 10_000 == 0:
                progress(offset, size)
    if not records:
        raise UserError(f"{manifest}: the manifest is empty")
    records.append((offset, 0.0))
    target = index_path(manifest)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            np.save(out, np.array(records, dtype=INDEX_DTYPE))
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: the index cannot be written: {error.strerror}") from None
    if progress is not None:
        progress(size, size)
    return len(records) - 1


class Manifest:
    """An indexed cut manifest, opened without being read.

    Raises:
        UserError: the manifest or its index is missing, or the index belongs to another version of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = _check_manifest(path)
        try:
            self._index = np.lib.format.open_memmap(index_path(path), mode="r")
        except FileNotFoundError:
            raise UserError(f"{path}: no index beside it; make one with: w2vscale data index {path}") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{index_path(path)}: not an index ({error}); remake with: w2vscale data index {path}"
            ) from None
        if self._index.dtype != INDEX_DTYPE or int(self._index["offset"][-1]) != size:
            raise UserError(f"{path}: changed since it was indexed; remake with: w2vscale data index {path}")
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

    def cut(self, number: int) -> Cut:
        """Utterance `number`, read from its line alone.

        Raises:
            UserError: the line does not hold a cut.
        """
        start, end = (int(offset) for offset in self._index["offset"][number : number + 2])
        line = os.pread(self._descriptor, end - start, start)
        try:
            return deserialize_item(json.loads(line))
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

    def samples(self, sampling_rate: int) -> NDArray[np.int64]:
        """Length of each utterance in samples at `sampling_rate` (Hz)."""
        durations = np.concatenate([manifest.durations for manifest in self.manifests])
        return np.rint(durations * sampling_rate).astype(np.int64)

    def cut(self, number: int) -> Cut:
        """Utterance `number`."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.manifests[which].cut(number - int(self._starts[which]))


def audio_path(cut: Cut) -> str:
    """The file an utterance's audio is in, or the kind of source it comes from."""
    source = cut.recording.sources[0]
    return str(source.source) if source.type == "file" else f"<{source.type}>"


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


def _duration_of(line: bytes, manifest: Path, number: int) -> float:
    try:
        cut = json.loads(line)
        duration = float(cut["duration"])
        if "Cut" not in cut["type"] or not 0.0 < duration < math.inf or not cut["recording"]["sources"]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{manifest}: line {number} is not a Lhotse cut of a recording with a duration above zero"
        ) from None
    return duration
