"""Lhotse cut manifests with O(1) random access through an index of offsets and durations beside each JSONL file."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from w2vscale.data.cuts import FILES, MAX_SECONDS, not_a_cut, read_cut
from w2vscale.data.decoding import is_audio
from w2vscale.errors import UserError
from w2vscale.files import nearest_path
from w2vscale.storage.cache import local_file
from w2vscale.storage.urls import Url, place, shown

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from w2vscale.config import DataConfig

INDEX_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("language", "<u2")])
"""One record per cut: the byte offset of its line, its duration in seconds, and its language as a number.

Languages are numbered from 0 in order of first appearance. A final record holds the size of the manifest in bytes as
its offset, and the CRC-32 of the manifest as its duration.
"""

T = TypeVar("T")


def index_path(manifest: Path) -> Path:
    """The path of the index of a manifest."""
    return manifest.with_name(manifest.name + ".index.npy")


def index_url(manifest: Url) -> Url:
    """The URL of the index of a manifest."""
    return Url(f"{manifest}.index.npy")


def local_manifest(manifest: Path | Url) -> Path:
    """A manifest itself, or a copy of one at a URL and of its index. Raises UserError if it cannot be copied."""
    if isinstance(manifest, Path):
        return manifest
    _check_form(manifest)
    return local_file(manifest, beside=[index_url(manifest)])


@contextmanager
def naming(local: Path, manifest: Path | Url) -> Iterator[None]:
    """Have errors in the block name a manifest in place of its copy on this machine."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace(str(local), str(manifest))) from None


def open_index(manifest: Path, *, name: Path | Url | None = None) -> NDArray[np.void]:
    """Map the index of a manifest into memory. Raises UserError if it is missing, damaged or not an index.

    `name`: what the manifest is called in messages, if it is a copy.
    """
    name = name or manifest
    path, command = index_path(manifest), f"w2vscale data index {name}"
    with opening_index(path, of=name, command=command):
        index: NDArray[np.void] = np.lib.format.open_memmap(path, mode="r")
    if index.dtype != INDEX_DTYPE or index.ndim != 1 or index.size < 2:
        raise UserError(f"{path}: not an index of this version of w2vscale; replace it with: {command}")
    offsets, durations = index["offset"], index["duration"][:-1]
    ascending = offsets[0] >= 0 and (offsets[1:] > offsets[:-1]).all()
    checksum = float(index["duration"][-1])
    whole = checksum.is_integer() and 0 <= checksum < 2**32
    if not (ascending and whole and (durations > 0.0).all() and (durations <= MAX_SECONDS).all()):
        raise UserError(f"{path}: damaged; replace it with: {command}")
    return index


@contextmanager
def opening_index(path: Path, *, of: Path | Url, command: str) -> Iterator[None]:
    """Raise UserError if the block cannot read the index at `path`, which `command` makes for the corpus `of`."""
    if path.exists() and not path.is_file():  # a FIFO would wait for ever
        raise UserError(f"{path}: not a file; replace it with: {command}")
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{of}: has no index; create it with: {command}") from None
    except Exception as error:  # a damaged header raises many types of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not an index ({reason}); replace it with: {command}") from None


class Manifest:
    """An indexed cut manifest; opening it reads no cut.

    One at a URL is copied to this machine first. `index` replaces the index on disk. `schemes`: the setting
    `data.url_schemes`. Raises UserError if the manifest or its index is missing, or if the manifest has changed since
    it was indexed.
    """

    def __init__(
        self, path: Path | Url, index: NDArray[np.void] | None = None, *, schemes: Collection[str] = FILES
    ) -> None:
        self.path, self.schemes = path, tuple(schemes)
        file = local_manifest(path)
        size = check_manifest(file)
        self._index = open_index(file, name=path) if index is None else index
        if int(self._index["offset"][-1]) != size:
            raise UserError(f"{path}: changed since it was indexed; update its index with: w2vscale data index {path}")
        # Kept open, so that it stays the file that was indexed even if another file takes its name. `pread` uses no
        # shared position, so forked loader processes can share the descriptor.
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return int(self._index.size) - 1

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Path | Url]]:
        return partial(Manifest, schemes=self.schemes), (self.path,)

    @property
    def durations(self) -> NDArray[np.float64]:
        """Duration of each utterance in seconds."""
        return self._index["duration"][:-1]

    @property
    def checksum(self) -> int:
        """CRC-32 of the file."""
        return int(self._index["duration"][-1])

    def languages(self) -> tuple[NDArray[np.uint16], list[str]]:
        """The language number of each utterance, and the language names by number ("" for cuts without a language)."""
        codes = self._index["language"][:-1]
        # The index has no names, which vary in length, so read the first line of each.
        return codes, [self.read(int(number), language_of) for number in np.unique(codes, return_index=True)[1]]

    def cut(self, number: int) -> Cut:
        """Read utterance `number`. Raises like `read`."""
        # Imported here because it takes seconds, and opening a manifest must not.
        from lhotse.serialization import deserialize_item

        return self.read(number, deserialize_item)

    def read(self, number: int, convert: Callable[[dict[str, Any]], T]) -> T:
        """Convert the JSON object of utterance `number`.

        Raises NotACut if its line does not hold a cut or not the one that was indexed, and UserError if its audio is
        not where `schemes` allow it.
        """
        where = f"{self.path}: utterance {number + 1}"
        cut = read_cut(self.line(number), where=where, schemes=self.schemes)
        if cut["duration"] != self._index["duration"][number]:
            raise not_a_cut(where, f"it lasts {cut['duration']:g} s, unlike when it was indexed")
        try:
            return convert(cut)
        except Exception as error:  # Lhotse raises many types of errors
            raise not_a_cut(where, f"{type(error).__name__}: {error}") from None

    def line(self, number: int) -> bytes:
        """The line of utterance `number`, with the line end and blank lines after it."""
        start, end = (int(offset) for offset in self._index["offset"][number : number + 2])
        return os.pread(self._descriptor, end - start, start)


class Corpus:
    """Several manifests as one numbered sequence of utterances. `schemes`: the setting `data.url_schemes`."""

    def __init__(
        self, paths: Sequence[Path | Url], *, setting: str = "data.train", schemes: Collection[str] = FILES
    ) -> None:
        if not paths:
            raise UserError(f"{setting} names no manifest: set {setting}=CUTS.jsonl")
        self.manifests = [Manifest(place(path), schemes=schemes) for path in paths]
        self.not_found = 0  # the index of a manifest has all of its utterances
        self._starts = np.cumsum([0, *(len(manifest) for manifest in self.manifests)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def durations(self) -> NDArray[np.float64]:
        """Duration of each utterance in seconds, uncropped."""
        return np.concatenate([manifest.durations for manifest in self.manifests])

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the manifests, independent of their paths."""
        return "-".join(f"{manifest.checksum:08x}" for manifest in self.manifests)

    def samples(self, sampling_rate: int) -> NDArray[np.int64]:
        """Length of each utterance in samples at `sampling_rate` (Hz)."""
        return np.rint(self.durations * sampling_rate).astype(np.int64)

    def cut(self, number: int) -> Cut:
        """Read utterance `number`. Raises like `Manifest.read`."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.manifests[which].cut(number - int(self._starts[which]))


def check_manifests(data: DataConfig) -> None:
    """Raise UserError if a manifest that is a file, or its index, is missing or cannot be used. Takes little time."""
    if data.mode == "stream":
        return
    further = ((f"data.validation_sets.{name}", places) for name, places in data.validation_sets.items())
    for setting, places in (("data.train", data.train), ("data.validation", data.validation), *further):
        files = [place for place in places if isinstance(place, Path)]
        if files or (setting == "data.train" and not places):
            Corpus(files, setting=setting, schemes=data.url_schemes)


def audio_path(cut: Cut) -> str:
    """The audio file, URL or shard of an utterance, or the type of its source if it has none of them."""
    source = cut.recording.sources[0]
    if source.type == "url":
        return shown(str(source.source))
    return str(source.source) if source.type == "file" else str((cut.custom or {}).get("shard_origin", source.type))


def check_manifest(path: Path) -> int:
    """The size of a manifest in bytes. Raises UserError if it is missing, unreadable, compressed or empty."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a manifest; make one with: w2vscale data prepare folder {path} OUT")
    if not path.is_file():
        raise UserError(f"{path}: no such manifest{nearest_path(path)}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read: permission denied")
    if is_audio(path.name):
        raise UserError(f"{path}: audio, not a manifest; make one with: w2vscale data prepare folder {path.parent} OUT")
    _check_form(path)
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the manifest is empty")
    return size


def _check_form(path: Path | Url) -> None:
    """Raise UserError if a manifest is not uncompressed JSONL, by its name."""
    if not path.name.endswith(".jsonl"):
        raise UserError(
            f"{path}: only uncompressed JSONL (*.jsonl) can be indexed; convert a manifest of another form with: "
            f"lhotse copy {path} NEW.jsonl"
        )


def language_of(cut: dict[str, Any]) -> str:
    """The language of the first supervision of a cut, else its custom field `language`, else ""."""
    supervisions, custom = cut.get("supervisions"), cut.get("custom")
    language = supervisions[0].get("language") if supervisions else None
    if language is None and custom:
        language = custom.get("language")
    return "" if language is None else str(language)
