"""Lhotse cut manifests with O(1) random access through an index of offsets and durations beside each JSONL file."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from numpy.typing import NDArray

from w2vscale.errors import UserError

INDEX_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<u2")])
"""One record per cut: the byte offset of its line, its duration in seconds, and its language as a number.

Languages are numbered from 0 in order of first appearance. A final record holds the size of the manifest in bytes as
its offset, and the CRC-32 of the manifest as its duration.
"""

Read = TypeVar("Read")


def index_path(manifest: Path) -> Path:
    """The path of the index of a manifest."""
    return manifest.with_name(manifest.name + ".index.npy")


class Manifest:
    """An indexed cut manifest; opening it reads no cut.

    Raises:
        UserError: the manifest or its index is missing, or the manifest has changed since it was indexed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = check_manifest(path)
        command = f"w2vscale data index {path}"
        try:
            self._index = np.lib.format.open_memmap(index_path(path), mode="r")
        except FileNotFoundError:
            raise UserError(f"{path}: has no index; create it with: {command}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{index_path(path)}: not an index ({error}); replace it with: {command}") from None
        if self._index.dtype != INDEX_DTYPE or self._index.size < 2:
            raise UserError(f"{index_path(path)}: not an index of this version of w2vscale; replace it with: {command}")
        if int(self._index["offset"][-1]) != size:
            raise UserError(f"{path}: changed since it was indexed; update its index with: {command}")
        # Kept open, so that it stays the file that was indexed even if another file takes its name. `pread` uses no
        # shared position, so forked loader processes can share the descriptor.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return int(self._index.size) - 1

    @property
    def durations(self) -> NDArray[np.float64]:
        """Duration of each utterance in seconds."""
        return self._index["duration"][:-1]

    @property
    def checksum(self) -> int:
        """CRC-32 of the file."""
        return int(self._index["duration"][-1])

    def languages(self) -> tuple[NDArray[np.uint16], list[str]]:
        """The language number of each utterance, and the language names by number ("" for cuts without a language).

        Raises:
            UserError: a line that must be read for a name does not hold a cut.
        """
        codes = self._index["language"][:-1]
        # The index has no names, which vary in length, so read one line for each.
        return codes, [self._read(number, language_of) for number in first_of_each(codes)]

    def cut(self, number: int) -> Cut:
        """Read utterance `number`.

        Raises:
            UserError: its line does not hold a cut.
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
        """Total duration of all utterances, uncropped."""
        return float(sum(manifest.durations.sum() for manifest in self.manifests)) / 3600

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the manifests, independent of their paths."""
        return "-".join(f"{manifest.checksum:08x}" for manifest in self.manifests)

    def samples(self, sampling_rate: int) -> NDArray[np.int64]:
        """Length of each utterance in samples at `sampling_rate` (Hz)."""
        durations = np.concatenate([manifest.durations for manifest in self.manifests])
        return np.rint(durations * sampling_rate).astype(np.int64)

    def cut(self, number: int) -> Cut:
        """Read utterance `number`."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.manifests[which].cut(number - int(self._starts[which]))


def audio_path(cut: Cut) -> str:
    """The audio file or shard of an utterance, or the type of its source if it has no file."""
    source = cut.recording.sources[0]
    return str(source.source) if source.type == "file" else str((cut.custom or {}).get("shard_origin", source.type))


def check_manifest(path: Path) -> int:
    """The size of a manifest in bytes.

    Raises:
        UserError: it is missing, unreadable, compressed or empty.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read: permission denied")
    if path.suffix != ".jsonl":
        raise UserError(
            f"{path}: only uncompressed JSONL (*.jsonl) can be indexed; convert it with: lhotse copy {path} NEW.jsonl"
        )
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the manifest is empty")
    return size


def language_of(cut: dict[str, Any]) -> str:
    """The language of the first supervision of a cut, else its custom field `language`, else ""."""
    supervisions, custom = cut.get("supervisions"), cut.get("custom")
    language = supervisions[0].get("language") if supervisions else None
    if language is None and custom:
        language = custom.get("language")
    return "" if language is None else str(language)


def first_of_each(codes: NDArray[np.uint16]) -> list[int]:
    """The position of the first occurrence of each number; numbers first occur in ascending order."""
    so_far = np.maximum.accumulate(codes)
    return [int(place) for place in np.searchsorted(so_far, np.arange(int(so_far[-1]) + 1, dtype=codes.dtype))]
