"""Read utterances from Lhotse Shar shards, in files or in an object store.

The audio of a cut is bytes in an archive, and nothing else is opened.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from lhotse.audio import AudioSource, Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy
from numpy.typing import NDArray

from w2vscale.data.cuts import NotACut, not_a_cut, read_cut, read_recording
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import nearest_path
from w2vscale.storage import objects
from w2vscale.storage.urls import Url

PLACEHOLDERS = ("shar",)  # the type of the source of audio in an archive
IN_CUTS = ("shar", "file")  # custom fields of a cut may name files, which are never opened
EMPTY = (".nodata", ".nometa")  # suffixes of the members of a cut without audio
LARGEST_MEMBER = 2**30
"""Bytes. A member is read whole, and a damaged archive can claim to hold one that fills the memory."""

LARGEST_MANIFEST = 2**30
"""Bytes of the manifest of a shard in a store, which is read whole."""

MANIFEST = re.compile(r"cuts\.([^.]*)\.jsonl(\.gz)?")

PLACE_DTYPE = np.dtype([("offset", "<i8"), ("duration", "<f8"), ("size", "<u4"), ("line", "<u4")])
"""Where an utterance is in its shard: the byte offset of its two members in the archive and their size, its duration in
seconds, and its line in the manifest, from 0."""


class Shard(NamedTuple):
    """One Shar shard: a manifest of cuts and a tar archive of their audio."""

    cuts: Path | Url
    recording: Path | Url
    sizes: tuple[int, int]
    """Bytes of both."""


def find_shards(folder: Path | Url) -> list[Shard]:
    """The shards of a folder by number. Raises UserError if it does not exist, has none, or lacks the audio of one."""
    sizes = _sizes_in(folder)
    manifests = {name: found[1] for name in sorted(sizes) if (found := MANIFEST.fullmatch(name))}
    if not manifests:
        raise UserError(f"{folder}: holds no shards (cuts.*.jsonl.gz); make some with: w2vscale data shar")
    shards = []
    for name, number in manifests.items():
        if name.endswith(".gz") and name.removesuffix(".gz") in manifests:
            raise UserError(f"{folder / name}: also there without .gz; remove one of the two")
        recording = f"recording.{number}.tar"
        if recording not in sizes:
            raise UserError(f"{folder / name}: its audio is missing: no {recording} beside it")
        shards.append(Shard(folder / name, folder / recording, (sizes[name], sizes[recording])))
    return shards


def _sizes_in(folder: Path | Url) -> dict[str, int]:
    """The sizes of the files in a folder by name. Raises UserError if there is no such folder."""
    if isinstance(folder, Url):
        return objects.list_objects(folder)
    if not folder.is_dir():
        hint = nearest_path(folder) or f"; make one with: w2vscale data shar CUTS.jsonl {folder}"
        raise UserError(f"{folder}: no such folder of shards{hint}")
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def open_file(path: Path | Url) -> BinaryIO:
    """Open a file of a shard; of those in a store only manifests, which are read whole."""
    if isinstance(path, Url):
        return io.BytesIO(objects.read(path, limit=LARGEST_MANIFEST))
    return path.open("rb")


def read_lines(path: Path | Url) -> Iterator[bytes]:
    """Yield the lines of the manifest of a shard. A damaged file raises many types of errors."""
    with open_file(path) as file:
        yield from gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file


@dataclass(frozen=True)
class StoredUtterance:
    """An utterance as it is stored: line `number` (from 0) of the manifest of its shard, and its part of the archive.

    `problem` says why one of them could not be read.
    """

    shard: Shard
    number: int
    duration: float  # seconds, when it was indexed
    line: bytes = b""
    members: bytes = b""
    problem: str = ""

    def cut(self) -> Cut | BadAudio:
        """Return the cut with its encoded audio, or why there is none.

        Raises UserError if its audio is not in the archive.
        """
        cut = self.cut_without_audio()
        if isinstance(cut, BadAudio):
            return cut
        try:
            return self._with_audio(cut)
        except NotACut as error:
            reason = str(error)
        except UserError:
            raise
        except Exception as error:  # damaged archives raise many types of errors
            reason = self.problem or f"its shard cannot be read: {in_one_line(error)}"
        return BadAudio(cut.id, str(self.shard.recording), "undecodable", reason)

    def cut_without_audio(self) -> Cut | BadAudio:
        """Return the cut as its line describes it, or why there is none. Raises like `cut`."""
        if not self.line:
            return BadAudio(f"line {self.number + 1}", str(self.shard.cuts), "undecodable", self.problem)
        where = f"{self.shard.cuts}: line {self.number + 1}"
        try:
            fields = read_cut(self.line, where=where, source_types=IN_CUTS)
            if fields["duration"] != self.duration:
                raise not_a_cut(where, f"it lasts {fields['duration']:g} s, unlike when it was indexed")
            return _deserialise(fields, where)
        except NotACut as error:
            return BadAudio(f"line {self.number + 1}", str(self.shard.cuts), "not a cut", str(error))

    def _with_audio(self, cut: Cut) -> Cut | BadAudio:
        with tarfile.open(fileobj=io.BytesIO(self.members), mode="r|") as archive:
            members = read_members(archive)
            (name, audio), (_, description) = next(members), next(members)
        stem, _, suffix = name.rpartition(".")
        if stem != cut.id:
            raise ValueError(f"in place of the audio of {cut.id!r} is that of {stem!r}")
        if f".{suffix}" in EMPTY:
            return BadAudio(cut.id, str(self.shard.cuts), "missing", "its shard has no audio of it")
        cut.recording = _recording(description, audio, where=f"{self.shard.recording}: {name}")
        cut.custom = {**(cut.custom or {}), "shard_origin": str(self.shard.cuts)}
        return cut


def read_utterances(shard: Shard, places: NDArray[np.void], *, audio: bool = True) -> list[StoredUtterance]:
    """Read the utterances of a shard at these places [PLACE_DTYPE], ascending, in one pass over its files.

    Without `audio`, its archive is not read. Raises UserError if it is in a store that cannot be used now.
    """
    lines, problem = _lines_at(shard.cuts, places["line"].tolist())
    members: list[bytes] = []
    try:
        if audio:
            ranges = list(zip(places["offset"].tolist(), places["size"].tolist(), strict=True))
            members += _read_ranges(shard.recording, ranges)
    except (OSError, objects.Missing) as error:
        problem = problem or f"its shard cannot be read: {in_one_line(error)}"
    members += [b""] * (len(places) - len(members))
    stored = zip(places["line"].tolist(), places["duration"].tolist(), members, strict=True)
    return [
        StoredUtterance(shard, number, duration, lines.get(number, b""), part, problem)
        for number, duration, part in stored
    ]


def _read_ranges(path: Path | Url, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of ranges (offset, size), ascending."""
    if isinstance(path, Url):
        yield from objects.read_ranges(path, ranges)
        return
    with path.open("rb") as file:
        for offset, size in ranges:
            file.seek(offset)
            yield file.read(size)


def _lines_at(path: Path | Url, numbers: list[int]) -> tuple[dict[int, bytes], str]:
    """Return lines by number, and why some of them could not be read."""
    wanted, last, lines = set(numbers), max(numbers), {}
    try:
        for number, line in enumerate(read_lines(path)):
            if number in wanted:
                lines[number] = line
            if number == last:
                return lines, ""
    except (objects.Unreachable, objects.Denied):
        raise
    except Exception as error:  # damaged gzip data raise many types of errors
        return lines, f"its shard cannot be read: {in_one_line(error)}"
    return lines, "its shard cannot be read: its manifest ends early"


def in_one_line(error: Exception) -> str:
    """The message of an error, or its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """The names and contents of an archive. Raises ValueError at its end, or if one is no plain file or too large."""
    for member in archive:
        content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
        if content is None:
            raise ValueError(f"{member.name} is not a file")
        if member.size > LARGEST_MEMBER:
            raise ValueError(f"{member.name} has {member.size:,} bytes; at most {LARGEST_MEMBER:,} are read")
        yield member.name, content.read()
    raise ValueError("the archive ends early")


def _deserialise(fields: dict[str, object], where: str) -> Cut:
    try:
        cut: Cut = deserialize_item(fields)
    except Exception as error:  # Lhotse raises many types of errors
        raise not_a_cut(where, f"{type(error).__name__}: {error}") from None
    return cut


def _recording(description: bytes, audio: bytes, *, where: str) -> Recording:
    """The recording that the JSON in the archive describes, with its audio."""
    recording = deserialize_item(read_recording(description, where=where, source_types=PLACEHOLDERS))
    source = AudioSource("memory", recording.channel_ids, audio)
    return fastcopy(recording, sources=[source], transforms=None)
