"""Prepare manifests of any folder of audio files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.serialization import deserialize_item

from w2vscale.corpora.header_cache import Header, HeaderCache
from w2vscale.corpora.manifests import (
    PreparedManifest,
    audio_files,
    cut_of_file,
    existing_folder,
    identifier_of,
    line_of,
)
from w2vscale.corpora.parallel import Progress, chunked, no_progress, parallel_map
from w2vscale.data.audio import AUDIO_SUFFIXES, AudioError
from w2vscale.data.cuts import NotACut, read_cut
from w2vscale.errors import UserError
from w2vscale.files import new_file, writing

FILES_PER_CHUNK = 256  # audio files that one process handles at a time
SHORTEST_SEGMENT = 0.1  # seconds; a recording cut into much shorter ones would fill the disk


def prepare_folder(
    audio: Path,
    output: Path,
    *,
    jobs: int = 1,
    segment_seconds: float | None = None,
    validation_share: float = 0.0,
    skip_unreadable: bool = False,
    progress: Progress = no_progress,
) -> list[PreparedManifest]:
    """Write `cuts_train.jsonl`, and `cuts_validation.jsonl` if wanted, for all audio files below a folder.

    The folder of a file is its speaker; a .txt file of the same name beside it is its transcript. `segment_seconds`
    splits longer recordings. `validation_share` is a fraction of the recordings, chosen by a hash of their names.
    The headers of the files are kept in `headers.sqlite`, so that a later call, or one after a kill, reads only files
    that are new, unreadable, or have another size or modification time. The manifests do not depend on this cache or
    on `jobs`. Each file has two steps in `progress`: its header and its cut.

    Raises UserError if there is no audio, a file is unreadable (unless `skip_unreadable`), two files have the same id,
    or the output cannot be written.
    """
    audio = existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    if segment_seconds is not None and not segment_seconds >= SHORTEST_SEGMENT:
        raise UserError(f"--segment-seconds {segment_seconds}: must be at least {SHORTEST_SEGMENT}")
    files = _find_files(audio)
    paths = [output / f"cuts_{name}.jsonl" for name in ("train", "validation")][: 2 if validation_share else 1]
    with writing(paths[0]):
        output.mkdir(parents=True, exist_ok=True)
    with closing(HeaderCache(output / "headers.sqlite", audio)) as cache:
        read, unreadable = _read_headers(files, audio, cache, jobs=jobs, progress=progress)
        readable = [file for file in files if file not in unreadable]
        cache.keep_only(readable)
        if unreadable and not (skip_unreadable and readable):
            others = f" (and {len(unreadable) - 1} more of {len(files)} files)" if len(unreadable) > 1 else ""
            advice = "no readable file is left" if skip_unreadable else "leave such files out with --skip-unreadable"
            raise UserError(f"{next(iter(unreadable.values()))}{others}; {advice}")
        limit = _validation_limit(readable, validation_share)
        chunks = list(chunked(readable, FILES_PER_CHUNK))
        headers = ([header for file in chunk if (header := cache.get(file))] for chunk in chunks)
        found = parallel_map(partial(_cuts_of, audio, limit, segment_seconds), headers, jobs=jobs, source=audio)
        done, counts, seconds = len(files) + len(unreadable), [0, 0], [0.0, 0.0]
        for path in paths:
            for stale in output.glob(f".{path.name}.*.partial"):  # of a killed call: the cache is locked
                stale.unlink()
        with ExitStack() as stack:
            manifests = [stack.enter_context(new_file(path)) for path in paths]
            for chunk, cuts in zip(chunks, found, strict=True):
                for which, line, duration in cuts:
                    manifests[which].write(line)
                    counts[which] += 1
                    seconds[which] += duration
                done += len(chunk)
                progress(done, 2 * len(files))
    return [
        PreparedManifest(path, count, total / 3600, len(unreadable), read, len(files) - read)
        for path, count, total in zip(paths, counts, seconds, strict=False)
    ]


def _find_files(folder: Path) -> list[str]:
    """The audio files below a folder, which have different ids."""
    files: dict[str, str] = {}
    for file in audio_files(folder):
        other = files.setdefault(identifier_of(file), file)
        if other is not file:
            raise UserError(f"{folder / file}: has the same id as {folder / other}; rename one of them")
    if not files:
        raise UserError(f"{folder}: no audio files (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
    return list(files.values())


def _read_headers(
    files: Sequence[str], folder: Path, cache: HeaderCache, *, jobs: int, progress: Progress
) -> tuple[int, dict[str, str]]:
    """Update the cache; returns how many headers were read, and the reason for each unreadable file."""
    chunks = list(chunked(files, FILES_PER_CHUNK))
    known = ([(file, cache.get(file)) for file in chunk] for chunk in chunks)
    read, done = 0, 0
    unreadable: dict[str, str] = {}
    found = parallel_map(partial(_changed_headers, folder), known, jobs=jobs, source=folder)
    for chunk, (headers, reasons) in zip(chunks, found, strict=True):
        if headers:
            cache.add(headers)
        unreadable |= reasons
        read += len(headers) + len(reasons)
        done += len(chunk)
        progress(done, 2 * len(files))
    return read, unreadable


def _changed_headers(folder: Path, known: Sequence[tuple[str, Header | None]]) -> tuple[list[Header], dict[str, str]]:
    """Read the headers of files that differ from the known ones, and the reason for each unreadable file."""
    headers: list[Header] = []
    unreadable: dict[str, str] = {}
    for file, header in known:
        try:
            status = (folder / file).stat()
            if header is None or (header.size, header.mtime_ns) != (status.st_size, status.st_mtime_ns):
                cut = json.dumps(cut_of_file(file, folder).to_dict())
                headers.append(Header(file, status.st_size, status.st_mtime_ns, cut))
        except (AudioError, OSError) as error:
            unreadable[file] = f"{folder / file}: {getattr(error, 'strerror', None) or error}"
    return headers, unreadable


def _hash(identifier: str) -> int:
    return zlib.crc32(identifier.encode())


def _validation_limit(files: Sequence[str], share: float) -> float:
    """Recordings whose hash is below this limit are for validation.

    With a limit, a file that is added later does not move other files. Small corpora hold out at least one recording.
    """
    if not share:
        return 0
    hashes = np.fromiter((_hash(identifier_of(file)) for file in files), np.int64, len(files))
    limit = max(share * 2**32, int(hashes.min()) + 1)
    if (hashes < limit).all():
        raise UserError(f"--validation-share {share}: leaves no recording for training (number of files: {len(files)})")
    return limit


def _cuts_of(
    folder: Path, limit: float, segment_seconds: float | None, headers: Sequence[Header]
) -> list[tuple[bool, str, float]]:
    """The cuts of some files: whether it is for validation, its line in the manifest, and its duration in seconds."""
    cuts = []
    for header in headers:
        try:
            cut = read_cut(str(header.cut).encode(), where=header.file)
        except NotACut:
            raise UserError(
                f"{folder / header.file}: its entry in headers.sqlite is damaged; delete that file"
            ) from None
        transcript = _transcript(folder / f"{os.path.splitext(header.file)[0]}.txt")
        if transcript is not None:
            cut["supervisions"] = [{**part, "text": transcript} for part in cut["supervisions"]]
        held_out = _hash(cut["id"]) < limit
        cuts += [(held_out, line_of(segment), segment["duration"]) for segment in _segments(cut, segment_seconds)]
    return cuts


def _transcript(path: Path) -> str | None:
    if not os.path.isfile(path):
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _segments(cut: dict[str, Any], seconds: float | None) -> list[dict[str, Any]]:
    if seconds is None or cut["duration"] <= seconds:
        return [cut]
    segments = deserialize_item(cut).cut_into_windows(seconds, keep_excessive_supervisions=True)
    return [segment.to_dict() for segment in segments]
