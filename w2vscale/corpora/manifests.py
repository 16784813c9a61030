"""Find audio files, make the Lhotse cuts of whole files, and write cut manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut

from w2vscale.data.audio import AUDIO_SUFFIXES, AudioError, check_header, only_libsndfile
from w2vscale.errors import UserError
from w2vscale.files import new_file


@dataclass(frozen=True)
class PreparedManifest:
    """A manifest that was written.

    The last three are numbers of audio files of the whole folder: left out because they are unreadable, read for their
    headers, and unchanged since an earlier call read their headers.
    """

    path: Path
    utterances: int
    hours: float
    unreadable: int = 0
    read: int = 0
    unchanged: int = 0


def existing_folder(path: Path) -> Path:
    """The absolute path of a folder. Raises UserError if there is no such folder."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder")
    return path.resolve()


def audio_files(folder: Path, below: str = "") -> Iterator[str]:
    """Paths of the audio files below a folder, relative to it and sorted by their parts.

    Raises UserError if a folder cannot be read.
    """
    try:
        with os.scandir(folder / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder / below}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from audio_files(folder, f"{below}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in AUDIO_SUFFIXES and os.path.isfile(entry):
            yield below + entry.name


def identifier_of(file: str) -> str:
    """The id of an audio file, from its path below the folder."""
    return os.path.splitext(file)[0].replace("/", "-")


def cut_of_file(file: str, folder: Path) -> Cut:
    """The cut of a whole audio file, without a transcript. The folder of the file is the speaker.

    Raises AudioError if the file cannot be used.
    """
    path = folder / file
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise AudioError("undecodable", "its name is not UTF-8: rename it") from None
    with only_libsndfile():
        recording = Recording.from_file(path, recording_id=identifier_of(file))
    if recording.num_samples <= 0:
        raise AudioError("empty", "holds no audio")
    cut = recording.to_cut()
    speaker = os.path.dirname(file) or None
    cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0.0, cut.duration, cut.channel, speaker=speaker)]
    check_header(cut)
    return cut


def write_cuts(cuts: Iterable[Cut], path: Path) -> PreparedManifest:
    """Write a JSONL manifest, one cut per line; it appears at `path` when it is complete.

    Raises UserError if it cannot be written.
    """
    count, seconds = 0, 0.0
    with new_file(path) as file:
        for cut in cuts:
            file.write(line_of(cut.to_dict()))
            count += 1
            seconds += cut.duration
    return PreparedManifest(path, count, seconds / 3600)


def line_of(cut: dict[str, Any]) -> str:
    """The line of a cut in a manifest."""
    return json.dumps(cut, ensure_ascii=False) + "\n"
