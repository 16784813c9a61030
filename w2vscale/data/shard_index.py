"""Folders of shards with O(1) access to any utterance, through an index of where each is in its shard."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from lhotse.cut import Cut
from numpy.typing import NDArray

from w2vscale.data.cuts import MAX_SECONDS
from w2vscale.data.manifest import opening_index
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.shards import LARGEST_MEMBER, PLACE_DTYPE, Shard, StoredUtterance, find_shards, read_utterances
from w2vscale.errors import UserError
from w2vscale.files import new_file
from w2vscale.storage.cache import local_file
from w2vscale.storage.objects import Missing
from w2vscale.storage.urls import Url

SHARD_DTYPE = np.dtype(
    [
        ("cuts_bytes", "<i8"),
        ("recording_bytes", "<i8"),
        ("utterances", "<i8"),
        ("left_out", "<i8"),
        ("recording_changed", "<i8"),
        ("cuts_checksum", "<u4"),
        ("places_checksum", "<u4"),
    ]
)
"""One record per shard: the sizes of its files in bytes, the number of its utterances in the index and of those left
out because they cannot be found, the time at which its archive changed last in nanoseconds, and the CRC-32 of its
manifest and of its part of the index."""


INDEX = "shards.index.npy"
BAD_SHARDS = "shards.bad_audio.jsonl"
"""The name of the list of utterances that are left out of an index."""


def shard_index_path(folder: Path) -> Path:
    """The path of the index of a folder of shards."""
    return folder / INDEX


def write_shard_index(folder: Path, shards: NDArray[np.void], places: NDArray[np.void]) -> None:
    """Write an index: the records of all shards [SHARD_DTYPE], then the places of all utterances [PLACE_DTYPE]."""
    with new_file(shard_index_path(folder), "wb") as file:
        np.save(file, shards)
        np.save(file, places)


def how_to_index(folder: Path | Url) -> str:
    """The command that writes the index of a folder."""
    if isinstance(folder, Url):
        return "w2vscale data index, on the folder before it is uploaded"
    return f"w2vscale data index {folder}"


def open_shard_index(folder: Path | Url) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Return the records of the shards of a folder and, mapped into memory, the places of their utterances.

    Raises UserError if the index is missing, damaged or not an index.
    """
    command = how_to_index(folder)
    try:
        path = local_file(folder / INDEX) if isinstance(folder, Url) else shard_index_path(folder)
    except Missing:
        raise UserError(f"{folder}: has no index; create it with: {command}") from None
    with opening_index(path, of=folder, command=command), path.open("rb") as file:
        shards: NDArray[np.void] = np.lib.format.read_array(file)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        places = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape) if all(shape) else np.zeros(shape, dtype)
    if (shards.dtype, places.dtype, shards.ndim, places.ndim) != (SHARD_DTYPE, PLACE_DTYPE, 1, 1):
        raise UserError(f"{path}: not an index of this version of w2vscale; replace it with: {command}")
    if not _is_consistent(shards, places):
        raise UserError(f"{path}: damaged; replace it with: {command}")
    return shards, places


def _is_consistent(shards: NDArray[np.void], places: NDArray[np.void]) -> bool:
    """Whether all places are inside of their shards and ascending, and the checksums are right."""
    counts, sizes = shards["utterances"], places["size"].astype(np.int64)
    if (counts < 0).any() or (counts > places.size).any() or counts.sum() != places.size:
        return False
    offsets, durations = places["offset"], places["duration"]
    ends = np.repeat(shards["recording_bytes"], counts)
    inside = (offsets >= 0) & (sizes <= LARGEST_MEMBER) & (offsets <= ends - sizes)
    first = np.zeros(places.size, bool)
    starts = np.cumsum(counts) - counts
    first[starts[counts > 0]] = True
    follows = (np.diff(offsets, prepend=0) > 0) & (np.diff(places["line"].astype(np.int64), prepend=0) > 0)
    lasting = (durations > 0.0) & (durations <= MAX_SECONDS)
    return bool((inside & lasting & (follows | first)).all()) and all(
        zlib.crc32(places[start : start + count].tobytes()) == checksum
        for start, count, checksum in zip(starts.tolist(), counts.tolist(), shards["places_checksum"], strict=True)
    )


class _Folder:
    """The shards of one folder. Raises UserError if they have changed since they were indexed."""

    def __init__(self, folder: Path | Url) -> None:
        self.folder = folder
        self.shards = find_shards(folder)
        self.records, self.places = open_shard_index(folder)
        command = how_to_index(folder)
        if len(self.records) != len(self.shards):
            raise UserError(
                f"{folder}: has {len(self.shards)} shards, but {len(self.records)} are indexed; update the index with: "
                f"{command}"
            )
        for shard, record in zip(self.shards, self.records[["cuts_bytes", "recording_bytes"]].tolist(), strict=True):
            for path, found, size in zip((shard.cuts, shard.recording), shard.sizes, record, strict=True):
                if found != size:
                    raise UserError(f"{path}: changed since it was indexed; update the index with: {command}")

    def __reduce__(self) -> tuple[type[_Folder], tuple[Path | Url]]:
        return _Folder, (self.folder,)


class ShardCorpus:
    """The utterances of several folders of shards as one numbered sequence, in the order in which they are stored."""

    def __init__(self, folders: Sequence[Path | Url]) -> None:
        if not folders:
            raise UserError("data.train names no folder of shards: set data.train=DIR (made by: w2vscale data shar)")
        self._folders = [_Folder(folder) for folder in folders]
        self._first = np.cumsum([0, *(folder.places.size for folder in self._folders)])
        self.shards = [shard for folder in self._folders for shard in folder.shards]
        records = np.concatenate([folder.records for folder in self._folders])
        self.starts = np.cumsum(np.concatenate([[0], records["utterances"]]))
        """The first utterance of each shard, and the number of utterances."""
        self.not_found = int(records["left_out"].sum())
        counted = zlib.crc32(records["utterances"].tobytes())
        self.fingerprint = f"{zlib.crc32(records['places_checksum'].tobytes(), counted):08x}"
        """Identifies the content of the shards, independent of their paths."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def name(self) -> str:
        """The folders."""
        return ", ".join(str(folder.folder) for folder in self._folders)

    @property
    def durations(self) -> NDArray[np.float64]:
        """Duration of each utterance in seconds, uncropped."""
        return np.concatenate([folder.places["duration"] for folder in self._folders])

    def samples(self, sampling_rate: int) -> NDArray[np.int64]:
        """Length of each utterance in samples at `sampling_rate` (Hz)."""
        return np.rint(self.durations * sampling_rate).astype(np.int64)

    def read(self, utterances: NDArray[np.int64], *, audio: bool = True) -> Iterator[StoredUtterance]:
        """Read utterances (ascending numbers), shard by shard, with or without their audio."""
        of_shard = np.searchsorted(self.starts, utterances, side="right") - 1
        for part in np.split(utterances, np.flatnonzero(np.diff(of_shard)) + 1):
            if part.size:
                shard, places = self._places(part)
                yield from read_utterances(shard, places, audio=audio)

    def cut(self, utterance: int) -> Cut | BadAudio:
        """Read one utterance; see `StoredUtterance.cut`."""
        return next(self.read(np.array([utterance]))).cut()

    def _places(self, utterances: NDArray[np.int64]) -> tuple[Shard, NDArray[np.void]]:
        """Return the shard of utterances, and their places in it."""
        which = int(np.searchsorted(self._first, utterances[0], side="right")) - 1
        shard = int(np.searchsorted(self.starts, utterances[0], side="right")) - 1
        return self.shards[shard], self._folders[which].places[utterances - self._first[which]]
