"""Build the index of a folder of Lhotse Shar: where each utterance is in its shard."""

from __future__ import annotations

import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2vscale.corpora.parallel import Progress, no_progress, parallel_map
from w2vscale.data.cuts import NotACut, read_cut
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.shard_index import BAD_SHARDS, SHARD_DTYPE, open_shard_index, shard_index_path, write_shard_index
from w2vscale.data.shards import (
    EMPTY,
    IN_CUTS,
    LARGEST_MEMBER,
    PLACE_DTYPE,
    Shard,
    find_shards,
    in_one_line,
    open_file,
    read_lines,
)
from w2vscale.errors import UserError
from w2vscale.files import append_records

SAVE_SECONDS = 60.0  # write what is indexed so far this often, so that a call that was stopped can be continued
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Key = tuple[int, int, int, int]
"""What a shard is recognised by: the sizes of its files, the time of its archive, and the checksum of its manifest."""


@dataclass(frozen=True)
class IndexedShards:
    """The number of shards and of utterances in an index, and the utterances left out because they cannot be found."""

    shards: int
    utterances: int
    bad: list[BadAudio]


class _Part(NamedTuple):
    """The index of one shard."""

    record: NDArray[np.void]  # one, SHARD_DTYPE
    places: NDArray[np.void]
    bad: list[BadAudio]


class _Pair(NamedTuple):
    """Two consecutive members of an archive with the same name: the audio of an utterance, and its description."""

    name: str
    offset: int  # bytes
    size: int  # bytes
    problem: str


def bad_shards_path(folder: Path) -> Path:
    """The path of the list of utterances that are not in the index of a folder."""
    return folder / BAD_SHARDS


def index_shards(folder: Path, progress: Progress = no_progress, *, jobs: int = 1) -> IndexedShards:
    """Write the index of a folder of shards, and a list of the utterances that are left out of it.

    Shards that are in an earlier index and have not changed are not read again. `progress` counts shards. Raises
    UserError if the folder has no shards, an archive is compressed, a cut has audio that is not in the archive, no
    utterance can be found, or the index cannot be written.
    """
    shards = find_shards(folder)
    parts: list[_Part] = []
    saved = time.monotonic()
    index = partial(_index_shard, _known_shards(folder))
    for done, part in enumerate(parallel_map(index, shards, jobs=jobs, source=folder), start=1):
        parts.append(part)
        progress(done, len(shards))
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(folder, parts)
            saved = time.monotonic()
    bad = [each for part in parts for each in part.bad]
    count = sum(part.places.size for part in parts)
    if not count:
        reason = f"; the first: {bad[0]}" if bad else ""
        raise UserError(f"{folder}: no utterance can be found in its shards{reason}")
    _save(folder, parts)
    bad_shards_path(folder).unlink(missing_ok=True)
    if bad:
        append_records(bad_shards_path(folder), map(asdict, bad))
    return IndexedShards(len(shards), count, bad)


def _save(folder: Path, parts: list[_Part]) -> None:
    write_shard_index(
        folder, np.concatenate([part.record for part in parts]), np.concatenate([part.places for part in parts])
    )


def _known_shards(folder: Path) -> Mapping[Key, _Part]:
    """Return the parts of the existing index. Shards with utterances to list are not among them."""
    if not shard_index_path(folder).is_file():
        return {}
    try:
        records, places = open_shard_index(folder)
    except UserError:
        return {}
    ends = np.cumsum(records["utterances"])
    parts = np.split(np.array(places), ends[:-1])
    keys = records[["cuts_bytes", "recording_bytes", "recording_changed", "cuts_checksum"]].tolist()
    return {
        key: _Part(records[place : place + 1], parts[place], [])
        for place, key in enumerate(keys)
        if not records["left_out"][place]
    }


def _index_shard(known: Mapping[Key, _Part], shard: Shard) -> _Part:
    assert isinstance(shard.recording, Path), "shards are indexed before they are uploaded"
    with open_file(shard.cuts) as file:
        content = file.read()
    archive = shard.recording.stat()
    key = len(content), archive.st_size, archive.st_mtime_ns, zlib.crc32(content)
    if key in known:
        return known[key]
    rows, bad = _find_utterances(shard)
    places = np.array(rows, PLACE_DTYPE)
    record = (*key[:2], places.size, len(bad), *key[2:], zlib.crc32(places.tobytes()))
    return _Part(np.array([record], SHARD_DTYPE), places, bad)


def _find_utterances(shard: Shard) -> tuple[list[tuple[int, float, int, int]], list[BadAudio]]:
    """Return the place of each utterance of a shard, and the utterances that cannot be found.

    The cuts and the pairs of members are in the same order. If one is missing on either side, the others are found by
    name.
    """
    pairs, damage = _find_pairs(Path(shard.recording))
    after = {pair.name: place for place, pair in reversed(list(enumerate(pairs)))}
    rows: list[tuple[int, float, int, int]] = []
    bad: list[BadAudio] = []
    lines, place = -1, 0
    try:
        for lines, line in enumerate(read_lines(shard.cuts)):
            if line.isspace():
                continue
            try:
                cut = read_cut(line, where=f"{shard.cuts}: line {lines + 1}", source_types=IN_CUTS)
            except NotACut as error:
                bad.append(BadAudio(f"line {lines + 1}", str(shard.cuts), "not a cut", str(error)))
                continue
            at = place if place < len(pairs) and pairs[place].name == cut["id"] else after.get(cut["id"], -1)
            if at < place:
                bad.append(_missing(cut["id"], shard, damage))
                continue
            place = at + 1
            if pairs[at].problem:
                bad.append(BadAudio(cut["id"], str(shard.recording), "undecodable", pairs[at].problem))
            else:
                rows.append((pairs[at].offset, cut["duration"], pairs[at].size, lines))
    except UserError:
        raise
    except Exception as error:  # damaged gzip data raise many types of errors
        reason = f"its shard cannot be read: {in_one_line(error)}"
        bad += [BadAudio(pair.name, str(shard.cuts), "undecodable", reason) for pair in pairs[place:]]
        bad = bad or [BadAudio(f"line {lines + 2}", str(shard.cuts), "undecodable", reason)]
    return rows, bad


def _missing(name: str, shard: Shard, damage: str) -> BadAudio:
    if damage:
        return BadAudio(name, str(shard.recording), "undecodable", f"its shard cannot be read: {damage}")
    return BadAudio(name, str(shard.recording), "missing", "its shard has no audio of it")


def _find_pairs(path: Path) -> tuple[list[_Pair], str]:
    """Return the pairs of members of an archive, and why it cannot be read to its end.

    Raises UserError if it is compressed.
    """
    pairs: list[_Pair] = []
    try:
        with open_file(path) as file:
            start = file.read(8)
            for mark, name in COMPRESSED.items():
                if start.startswith(mark):
                    raise UserError(
                        f"{path}: compressed ({name}), so utterances cannot be found in it; decompress all archives of "
                        "the folder"
                    )
            size = file.seek(0, 2)
            file.seek(0)
            waiting: tarfile.TarInfo | None = None
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in _headers(archive):
                    if waiting is not None and _stem(waiting) == _stem(member):
                        pairs.append(_pair(waiting, member, size))
                        waiting = None
                    else:
                        waiting = member
                file.seek(archive.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except UserError:
        raise
    except Exception as error:  # damaged archives raise many types of errors
        return pairs, in_one_line(error)
    return pairs, "" if whole else "the archive ends early"


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive. Raises ValueError where a damaged one would lead back to an earlier one."""
    last = -1
    while (member := archive.next()) is not None:
        if member.offset <= last or member.size < 0:
            raise ValueError(f"{member.name[:100]!r} is damaged")
        last = member.offset
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        yield member


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[0]


def _pair(audio: tarfile.TarInfo, description: tarfile.TarInfo, archive_bytes: int) -> _Pair:
    end = description.offset_data + description.size
    problem = ""
    for member in (audio, description):
        if not member.isreg() or member.issparse():
            problem = problem or f"its shard cannot be read: {member.name} is not a file"
        if member.size > LARGEST_MEMBER:
            limit = f"{member.size:,} bytes; at most {LARGEST_MEMBER:,} are read"
            problem = problem or f"its shard cannot be read: {member.name} has {limit}"
    if end - audio.offset > LARGEST_MEMBER:
        problem = problem or f"its shard cannot be read: it has {end - audio.offset:,} bytes"
    if end > archive_bytes:
        problem = problem or "its shard cannot be read: the archive ends early"
    if any(audio.name.endswith(suffix) for suffix in EMPTY):
        problem = problem or "its shard has no audio of it"
    return _Pair(_stem(audio), audio.offset, end - audio.offset, problem)
