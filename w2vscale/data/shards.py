"""Read Lhotse Shar shards: the audio of a cut is bytes in an archive, and nothing else is opened."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lhotse.audio import AudioSource, Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy

from w2vscale.data.cuts import NotACut, read_cut, read_recording
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import nearest_path

PLACEHOLDERS = ("shar",)  # the type of the source of audio in an archive
IN_CUTS = ("shar", "file")  # custom fields of a cut may name files, which are never opened
EMPTY = (".nodata", ".nometa")  # suffixes of the members of a cut without audio
LARGEST_MEMBER = 2**30
"""Bytes. A member is read whole, and a small compressed archive can hold one that fills the memory."""


class Shard(NamedTuple):
    """One Shar shard: a manifest of cuts and a tar archive of their audio."""

    cuts: Path
    recording: Path


def find_shards(folder: Path) -> list[Shard]:
    """The shards of a folder by number. Raises UserError if it does not exist, has none, or lacks the audio of one."""
    if not folder.is_dir():
        hint = nearest_path(folder) or f"; make one with: w2vscale data shar CUTS.jsonl {folder}"
        raise UserError(f"{folder}: no such folder of shards{hint}")
    manifests = sorted(folder.glob("cuts.*.jsonl*"))
    if not manifests:
        raise UserError(f"{folder}: holds no shards (cuts.*.jsonl.gz); make some with: w2vscale data shar")
    shards = []
    for cuts in manifests:
        recording = folder / f"recording.{cuts.name.split('.')[1]}.tar"
        if not cuts.is_file() or not recording.is_file():
            raise UserError(f"{cuts}: its audio is missing: no {recording.name} beside it")
        shards.append(Shard(cuts, recording))
    return shards


def read_cuts(path: Path) -> Iterator[Cut]:
    """Yield the cuts of the manifest of a shard, without audio.

    Raises UserError if one has audio that is neither in an archive nor in a file, and NotACut if a line is not a cut.
    A damaged file raises many types of errors.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield deserialize_item(read_cut(line, where=f"{path}: line {number}", source_types=IN_CUTS))


def read_shards(shards: Iterable[Shard]) -> Iterator[Cut | BadAudio]:
    """Yield cuts with their encoded audio and, for a damaged shard, a `BadAudio` for each utterance lost.

    Raises UserError if a cut has audio that is not in the archive.
    """
    for shard in shards:
        read = 0
        try:
            for cut in _cuts_with_audio(shard):
                read += 1
                yield cut
        except NotACut as error:
            yield from _lost(shard, read, str(error))
        except UserError:
            raise
        except Exception as error:  # damaged gzip, tar and audio data raise many types of errors
            yield from _lost(shard, read, f"its shard cannot be read: {in_one_line(error)}")


def in_one_line(error: Exception) -> str:
    """The message of an error, or its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _cuts_with_audio(shard: Shard) -> Iterator[Cut | BadAudio]:
    with tarfile.open(shard.recording, "r|*") as archive:
        members = _members(archive)
        for cut in read_cuts(shard.cuts):
            (name, audio), (_, description) = next(members), next(members)
            stem, _, suffix = name.rpartition(".")
            if stem != cut.id:
                raise ValueError(f"the audio after {cut.id!r} is that of {stem!r}")
            if f".{suffix}" in EMPTY:
                yield BadAudio(cut.id, str(shard.cuts), "missing", "its shard has no audio of it")
                continue
            cut.recording = _recording(description, audio, where=f"{shard.recording}: {name}")
            cut.custom = {**(cut.custom or {}), "shard_origin": str(shard.cuts)}
            yield cut


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """The names and contents of an archive. Raises ValueError at its end, or if one is no plain file or too large."""
    for member in archive:
        content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
        if content is None:
            raise ValueError(f"{member.name} is not a file")
        if member.size > LARGEST_MEMBER:
            raise ValueError(f"{member.name} has {member.size:,} bytes; at most {LARGEST_MEMBER:,} are read")
        yield member.name, content.read()
    raise ValueError("the archive ends early")


def _recording(description: bytes, audio: bytes, *, where: str) -> Recording:
    """The recording that the JSON in the archive describes, with its audio."""
    recording = deserialize_item(read_recording(description, where=where, source_types=PLACEHOLDERS))
    source = AudioSource("memory", recording.channel_ids, audio)
    return fastcopy(recording, sources=[source], transforms=None)


def _lost(shard: Shard, read: int, reason: str) -> list[BadAudio]:
    """List the utterances of a damaged shard after the first `read`, or the shard itself if its manifest is damaged."""
    try:
        names = [cut.id for cut in islice(read_cuts(shard.cuts), read, None)]
    except Exception:
        return [BadAudio(shard.cuts.name, str(shard.cuts), "undecodable", reason)]
    return [BadAudio(name, str(shard.recording), "undecodable", reason) for name in names]
