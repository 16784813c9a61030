"""From corpora on disk to Lhotse cut manifests: LibriSpeech's layout by Lhotse's recipes, or any folder of audio."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from w2vscale.data.audio import AudioError, check_header, libsndfile_reason
from w2vscale.data.journal import HeaderJournal, describes, journal_line, writing
from w2vscale.data.parallel import WorkerDied, parallel_map
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
    way, and for any number of `jobs`. `progress` is called with (files done, files in all), headers and cuts apart.

    Raises:
        UserError: no audio, a file that is no audio (unless `skip_unreadable`), two files with one id, or the
            output cannot be written.
    """
    audio = _existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    if window_seconds is not None and not window_seconds > 0:
        raise UserError(f"--window {window_seconds}: must be above 0 seconds")
    files = list(_audio_files(str(audio)))
    if not files:
        raise UserError(f"{audio}: no audio in it (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
    _refuse_duplicates(files, audio)
    with writing(output / "cuts_train.jsonl"):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with closing(HeaderJournal(output / "headers.jsonl", audio)) as journal:
            steps = _Steps(2 * len(files), progress)
            read, unreadable = _read_headers(files, audio, journal, jobs, steps)
            readable = [file for file in files if file not in unreadable] if unreadable else files
            journal.keep_only(readable)
            if unreadable and not (skip_unreadable and readable):
                more = f" and {len(unreadable) - 1} more of {len(files)} files" if len(unreadable) > 1 else ""
                advice = "no other file is left" if skip_unreadable else "leave such files out with --skip-unreadable"
                raise UserError(f"{next(iter(unreadable.values()))}{more}; {advice}")
            limit = _held_out_below(readable, validation_share)
            found = _write_manifests(readable, audio, journal, output, limit, window_seconds, jobs, steps)
    except WorkerDied as error:
        raise UserError(f"{audio}: {error}") from None
    known = len(files) - read
    return [PreparedManifest(*manifest, left_out=len(unreadable), read=read, known=known) for manifest in found]


def write_cuts(cuts: Iterable[Cut], path: Path) -> PreparedManifest:
    """Write a JSONL manifest, one cut a line; it appears whole or not at all."""
    count, seconds = 0, 0.0
    with _whole(path) as lines:
        for cut in cuts:
            lines.write(_line(cut.to_dict()))
            count += 1
            seconds += cut.duration
    return PreparedManifest(path, count, seconds / 3600)
