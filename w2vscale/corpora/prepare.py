"""From corpora on disk to Lhotse cut manifests: LibriSpeech's layout by Lhotse's recipes, or any folder of audio."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from w2vscale.corpora.journal import HeaderJournal, describes, journal_line, writing
from w2vscale.corpora.parallel import parallel_map
from w2vscale.data.audio import AudioError, check_header, libsndfile_reason
from w2vscale.errors import UserError

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
CHUNK = 256
"""Files that one process treats at a time."""


@dataclass(frozen=True)
class PreparedManifest:
    """A manifest that was written; what is said of audio files is said of the whole folder."""

    path: Path
    utterances: int
    hours: float
    left_out: int = 0
    """Audio files that are unreadable."""
    read: int = 0
    """Audio files whose headers were read."""
    known: int = 0
    """Audio files that an earlier call has read, unchanged since."""


def prepare_librispeech(
    corpus: Path, output: Path, *, parts: list[str] | None = None, mini: bool = False, jobs: int = 1
) -> list[PreparedManifest]:
    """Write `cuts_PART.jsonl` for each part of LibriSpeech or mini LibriSpeech found in `corpus`.

    Raises:
        UserError: the folder or a part is missing, a part holds no utterance, or the output cannot be written.
    """
    # Imported here: the recipes module pulls in every corpus that Lhotse knows.
    from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, prepare_librispeech

    known = MINI_LIBRISPEECH if mini else (*LIBRISPEECH, *MINI_LIBRISPEECH)
    corpus = _existing_folder(corpus)
    if not any((corpus / part).is_dir() for part in known) and (corpus / "LibriSpeech").is_dir():
        corpus = corpus / "LibriSpeech"
    wanted = parts or [part for part in known if (corpus / part).is_dir()]
    for part in wanted:
        if part not in known:
            raise UserError(f"--part {part}: not a part of the corpus (parts: {', '.join(known)})")
        if not (corpus / part).is_dir():
            raise UserError(f"{corpus / part}: no such folder")
    if not wanted:
        raise UserError(f"{corpus}: no part of the corpus in it (looked for {', '.join(known)})")
    written = []
    for part in wanted:
        logging.getLogger().setLevel(logging.WARNING)
        try:
            sets = prepare_librispeech(corpus, dataset_parts=[part], num_jobs=jobs)[part]
        except Exception as error:
            unreadable = _first_unreadable(corpus / part)
            reason = f"no utterance with a transcript could be taken: {libsndfile_reason(error)}"
            raise UserError(unreadable or f"{corpus / part}: {reason}") from None
        recordings, supervisions = sets["recordings"], sets["supervisions"]
        assert isinstance(recordings, RecordingSet) and isinstance(supervisions, SupervisionSet)
        if len(recordings) == 0:
            raise UserError(f"{corpus / part}: no utterance with a transcript in it")
        # A recording is one utterance, and its id is the corpus' own; Lhotse would append a number.
        cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
        named = [cut.with_id(cut.recording.id) for cut in cuts]
        written.append(write_cuts(sorted(named, key=lambda cut: cut.id), output / f"cuts_{part}.jsonl"))
    return written


def prepare_folder(
    audio: Path,
    output: Path,
    *,
    jobs: int = 1,
    window_seconds: float | None = None,
    validation_share: float = 0.0,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreparedManifest]:
    """Write `cuts_train.jsonl` (and `cuts_validation.jsonl`) for every audio file below a folder.

    The file's folder is taken as the speaker; a .txt of the same name beside it is the transcript. Recordings
    longer than `window_seconds` are cut into windows. `validation_share` of the recordings, chosen by a hash of
    their names, go into the validation manifest.

    What the headers say is kept in `headers.jsonl`: a later call, or one after a kill, reads those of files that are
    new or have another size or time of change, and of files that were unreadable. The manifests are the same either
    way, and for any number of `jobs`. `progress` is called with (steps done, steps in all): two for each file, its
    header and its cut.

    Raises:
        UserError: no audio, a file that is no audio (unless `skip_unreadable`), two files with one id, or the
            output cannot be written.
    """
    audio = _existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    if window_seconds is not None and not window_seconds > 0:
        raise UserError(f"--window {window_seconds}: must be above 0 seconds")
    files = list(_audio_files(audio))
    if not files:
        raise UserError(f"{audio}: no audio in it (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
    _refuse_duplicates(files, audio)
    with writing(output / "cuts_train.jsonl"):
        output.mkdir(parents=True, exist_ok=True)
    with closing(HeaderJournal(output / "headers.jsonl", audio)) as journal:
        read, unreadable = _read_headers(files, audio, journal, jobs=jobs, progress=progress)
        readable = [file for file in files if file not in unreadable] if unreadable else files
        journal.keep_only(readable)
        if unreadable and not (skip_unreadable and readable):
            more = f" and {len(unreadable) - 1} more of {len(files)} files" if len(unreadable) > 1 else ""
            advice = "no other file is left" if skip_unreadable else "leave such files out with --skip-unreadable"
            raise UserError(f"{next(iter(unreadable.values()))}{more}; {advice}")
        limit = _hash_limit(readable, validation_share)
        known = ([line for file in chunk if (line := journal.line(file))] for chunk in _chunks(readable))
        found = parallel_map(partial(_cut_lines, audio, limit, window_seconds), known, jobs=jobs, source=audio)
        names = ("train", "validation") if validation_share else ("train",)

        def report(chunks: int) -> None:
            if progress is not None:
                progress(2 * len(files) - max(len(readable) - chunks * CHUNK, 0), 2 * len(files))

        written = _write_sets([output / f"cuts_{name}.jsonl" for name in names], found, report)
    return [replace(one, left_out=len(unreadable), read=read, known=len(files) - read) for one in written]


def write_cuts(cuts: Iterable[Cut], path: Path) -> PreparedManifest:
    """Write a JSONL manifest, one cut a line; it appears whole or not at all."""
    count, seconds = 0, 0.0
    with whole_file(path) as lines:
        for cut in cuts:
            lines.write(_line(cut.to_dict()))
            count += 1
            seconds += cut.duration
    return PreparedManifest(path, count, seconds / 3600)


@dataclass(frozen=True)
class _Lines:
    """Some lines of a manifest."""

    text: str
    cuts: int
    hours: float


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path.resolve()


def _audio_files(folder: Path, below: str = "") -> Iterator[str]:
    """Paths of the audio files below a folder, relative to it, in the order of their parts."""
    try:
        with os.scandir(folder / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder / below}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _audio_files(folder, f"{below}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in AUDIO_SUFFIXES and entry.is_file():
            yield below + entry.name


def _identifier(file: str) -> str:
    return os.path.splitext(file)[0].replace("/", "-")


def _refuse_duplicates(files: Sequence[str], folder: Path) -> None:
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(_identifier(file), file)
        if other is not file:
            raise UserError(f"{folder / file}: would have the same id as {folder / other}: rename one")


def _chunks(files: Sequence[str]) -> Iterator[Sequence[str]]:
    return (files[start : start + CHUNK] for start in range(0, len(files), CHUNK))


def _read_headers(
    files: Sequence[str],
    folder: Path,
    journal: HeaderJournal,
    *,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, str]]:
    """Bring the journal up to date; returns how many headers were read, and why files are unreadable."""
    questions = ([(file, journal.line(file)) for file in chunk] for chunk in _chunks(files))
    read, done = 0, 0
    unreadable: dict[str, str] = {}
    for lines, reasons in parallel_map(partial(_headers, folder), questions, jobs=jobs, source=folder):
        journal.append(lines)
        unreadable |= reasons
        read += len(lines) + len(reasons)
        done = min(done + CHUNK, len(files))
        if progress is not None:
            progress(done, 2 * len(files))
    return read, unreadable


def _headers(
    folder: Path, questions: Sequence[tuple[str, bytes | None]]
) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """The journal's lines of the files that the lines given do not describe, and why files are unreadable."""
    lines: list[tuple[str, bytes]] = []
    unreadable: dict[str, str] = {}
    for file, known in questions:
        try:
            status = (folder / file).stat()
            if known is None or not describes(known, file, status):
                lines.append((file, journal_line(file, status, _cut_of(file, folder))))
        except (AudioError, OSError) as error:
            unreadable[file] = f"{folder / file}: {getattr(error, 'strerror', None) or error}"
    return lines, unreadable


def _cut_of(file: str, folder: Path) -> Cut:
    """The cut of a whole file, without its transcript.

    Raises:
        AudioError: there is none, or it would not agree with the file.
    """
    path = folder / file
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise AudioError("undecodable", "its name is not UTF-8: rename it") from None
    try:
        soundfile.info(path)  # Lhotse's own error would name the last library that it tried
        recording = Recording.from_file(path, recording_id=_identifier(file))
    except Exception as error:
        raise AudioError("undecodable", f"not readable as audio: {libsndfile_reason(error)}") from None
    if recording.num_samples <= 0:
        raise AudioError("empty", "holds no audio")
    cut = recording.to_cut()
    cut.supervisions = [
        SupervisionSegment(
            id=recording.id,
            recording_id=recording.id,
            start=0.0,
            duration=recording.duration,
            channel=recording.channel_ids if recording.num_channels > 1 else recording.channel_ids[0],
            speaker=os.path.dirname(file) or None,
        )
    ]
    check_header(cut)
    return cut


def _hash(identifier: str) -> int:
    return zlib.crc32(identifier.encode())


def _hash_limit(files: Sequence[str], share: float) -> float:
    """Recordings with a hash below this are for validation.

    A threshold, so that a file added later moves no other; small corpora hold out at least one recording.
    """
    if not share:
        return 0
    hashes = np.fromiter((_hash(_identifier(file)) for file in files), np.int64, len(files))
    limit = max(share * 2**32, int(hashes.min()) + 1)
    if (hashes < limit).all():
        raise UserError(f"--validation-share {share}: leaves a set of {len(files)} recordings empty")
    return limit


def _write_sets(
    paths: Sequence[Path], found: Iterable[Sequence[_Lines]], report: Callable[[int], None]
) -> list[PreparedManifest]:
    """Write several manifests side by side, and report how many chunks of them are written."""
    written = [PreparedManifest(path, 0, 0.0) for path in paths]
    with ExitStack() as stack:
        outputs = [stack.enter_context(whole_file(path)) for path in paths]
        for done, sets in enumerate(found, start=1):
            for number, (output, lines) in enumerate(zip(outputs, sets, strict=False)):
                output.write(lines.text)
                so_far = written[number]
                written[number] = replace(
                    so_far, utterances=so_far.utterances + lines.cuts, hours=so_far.hours + lines.hours
                )
            report(done)
    return written


def _cut_lines(
    folder: Path, limit: float, window_seconds: float | None, lines: Sequence[bytes]
) -> tuple[_Lines, _Lines]:
    """What the journal's lines of some files give for training, and for validation."""
    texts: tuple[list[str], list[str]] = ([], [])
    seconds = [0.0, 0.0]
    for line in lines:
        entry = json.loads(line)
        cut = entry["cut"]
        transcript = _transcript(folder / f"{os.path.splitext(entry['file'])[0]}.txt")
        if transcript is not None:
            cut["supervisions"][0]["text"] = transcript
        which = int(_hash(cut["id"]) < limit)
        for part in _windows(cut, window_seconds):
            texts[which].append(_line(part))
            seconds[which] += part["duration"]
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


def _windows(cut: dict[str, Any], seconds: float | None) -> list[dict[str, Any]]:
    if seconds is None or cut["duration"] <= seconds:
        return [cut]
    windows = deserialize_item(cut).cut_into_windows(seconds, keep_excessive_supervisions=True)
    return [window.to_dict() for window in windows]


def _line(cut: dict[str, Any]) -> str:
    return json.dumps(cut, ensure_ascii=False) + "\n"


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears whole or not at all."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial_path.open("w", encoding="utf-8") as lines:
                yield lines
            partial_path.replace(path)
    finally:
        with suppress(OSError):
            partial_path.unlink()


def _first_unreadable(folder: Path) -> str | None:
    for file in _audio_files(folder):
        try:
            _cut_of(file, folder)
        except AudioError as error:
            return f"{folder / file}: {error}"
    return None
