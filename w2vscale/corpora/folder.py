"""Prepare manifests of any folder of audio files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.serialization import deserialize_item

from w2vscale.corpora.audio_files import AUDIO_SUFFIXES, audio_files, cut_of_file, existing_folder, identifier_of
from w2vscale.corpora.header_cache import Header, HeaderCache
from w2vscale.corpora.manifests import PreparedManifest, line_of
from w2vscale.corpora.parallel import parallel_map
from w2vscale.data.audio import AudioError
from w2vscale.errors import UserError
from w2vscale.files import new_file, writing

FILES_PER_CHUNK = 256
"""Audio files that one process handles at a time."""


def prepare_folder(
    audio: Path,
    output: Path,
    *,
    jobs: int = 1,
    segment_seconds: float | None = None,
    validation_share: float = 0.0,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreparedManifest]:
    """Write `cuts_train.jsonl`, and `cuts_validation.jsonl` if wanted, for all audio files below a folder.

    The folder of a file is its speaker; a .txt file of the same name beside it is its transcript. The headers of the
    files are kept in `headers.sqlite`, so that a later call, or one after a kill, reads only files that are new,
    unreadable, or have another size or modification time. The manifests do not depend on the cache or on `jobs`.

    Args:
        audio: The folder.
        output: Where the manifests are written.
        jobs: Parallel processes.
        segment_seconds: Split longer recordings into segments of this duration.
        validation_share: Fraction of the recordings for the validation manifest, chosen by a hash of their names.
        skip_unreadable: Leave out files that are not readable as audio.
        progress: Called with (steps done, total steps). Each file has two steps: its header and its cut.

    Raises:
        UserError: no audio; an unreadable file (unless `skip_unreadable`); two files with the same id; the output
            cannot be written.
    """
    audio = existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    if segment_seconds is not None and not segment_seconds > 0:
        raise UserError(f"--segment-seconds {segment_seconds}: must be above 0")
    files = list(audio_files(audio))
    if not files:
        raise UserError(f"{audio}: no audio files (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
    _refuse_duplicates(files, audio)
    with writing(output / "cuts_train.jsonl"):
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
        headers = ([header for file in chunk if (header := cache.get(file))] for chunk in _chunks(readable))
        found = parallel_map(partial(_lines_of, audio, limit, segment_seconds), headers, jobs=jobs, source=audio)
        names = ("train", "validation") if validation_share else ("train",)

        def report(chunks: int) -> None:
            if progress is not None:
                progress(2 * len(files) - max(len(readable) - chunks * FILES_PER_CHUNK, 0), 2 * len(files))

        written = _write_manifests([output / f"cuts_{name}.jsonl" for name in names], found, report)
    return [replace(one, unreadable=len(unreadable), read=read, unchanged=len(files) - read) for one in written]


@dataclass(frozen=True)
class _Lines:
    """Some lines of a manifest."""

    text: str
    utterances: int
    hours: float


def _refuse_duplicates(files: Sequence[str], folder: Path) -> None:
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(identifier_of(file), file)
        if other is not file:
            raise UserError(f"{folder / file}: has the same id as {folder / other}; rename one of them")


def _chunks(files: Sequence[str]) -> Iterator[Sequence[str]]:
    return (files[start : start + FILES_PER_CHUNK] for start in range(0, len(files), FILES_PER_CHUNK))


def _read_headers(
    files: Sequence[str],
    folder: Path,
    cache: HeaderCache,
    *,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, str]]:
    """Update the cache; returns how many headers were read, and the reason for each unreadable file."""
    known = ([(file, cache.get(file)) for file in chunk] for chunk in _chunks(files))
    read, done = 0, 0
    unreadable: dict[str, str] = {}
    for headers, reasons in parallel_map(partial(_changed_headers, folder), known, jobs=jobs, source=folder):
        if headers:
            cache.add(headers)
        unreadable |= reasons
        read += len(headers) + len(reasons)
        done = min(done + FILES_PER_CHUNK, len(files))
        if progress is not None:
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


def _lines_of(
    folder: Path, limit: float, segment_seconds: float | None, headers: Sequence[Header]
) -> tuple[_Lines, _Lines]:
    """The lines of some files for the training and the validation manifest."""
    texts: tuple[list[str], list[str]] = ([], [])
    seconds = [0.0, 0.0]
    for header in headers:
        cut = json.loads(header.cut)
        transcript = _transcript(folder / f"{os.path.splitext(header.file)[0]}.txt")
        if transcript is not None:
            cut["supervisions"][0]["text"] = transcript
        which = int(_hash(cut["id"]) < limit)
        for segment in _segments(cut, segment_seconds):
            texts[which].append(line_of(segment))
            seconds[which] += segment["duration"]
    train, validation = (
        _Lines("".join(text), len(text), total / 3600) for text, total in zip(texts, seconds, strict=True)
    )
    return train, validation


def _transcript(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _segments(cut: dict[str, Any], seconds: float | None) -> list[dict[str, Any]]:
    if seconds is None or cut["duration"] <= seconds:
        return [cut]
    segments = deserialize_item(cut).cut_into_windows(seconds, keep_excessive_supervisions=True)
    return [segment.to_dict() for segment in segments]


def _write_manifests(
    paths: Sequence[Path], found: Iterable[Sequence[_Lines]], report: Callable[[int], None]
) -> list[PreparedManifest]:
    """Write several manifests in parallel, and report the number of chunks written."""
    written = [PreparedManifest(path, 0, 0.0) for path in paths]
    with ExitStack() as stack:
        for path in paths:
            for partial_file in path.parent.glob(f".{path.name}.*.partial"):  # of a killed call: the cache is locked
                partial_file.unlink()
        files = [stack.enter_context(new_file(path)) for path in paths]
        for done, sets in enumerate(found, start=1):
            for number, (file, lines) in enumerate(zip(files, sets, strict=False)):
                file.write(lines.text)
                so_far = written[number]
                written[number] = replace(
                    so_far, utterances=so_far.utterances + lines.utterances, hours=so_far.hours + lines.hours
                )
            report(done)
    return written
