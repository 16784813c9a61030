"""Find the audio files below a folder, and make the Lhotse cut of a whole file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut

from w2vscale.data.audio import AudioError, check_header, libsndfile_reason
from w2vscale.errors import UserError

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


def existing_folder(path: Path) -> Path:
    """The absolute path of a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path.resolve()


def audio_files(folder: Path, below: str = "") -> Iterator[str]:
    """Paths of the audio files below a folder, relative to it and sorted by their parts.

    Raises:
        UserError: a folder cannot be read.
    """
    try:
        with os.scandir(folder / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder / below}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from audio_files(folder, f"{below}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in AUDIO_SUFFIXES and entry.is_file():
            yield below + entry.name


def identifier_of(file: str) -> str:
    """The id of an audio file, from its path below the folder."""
    return os.path.splitext(file)[0].replace("/", "-")


def cut_of_file(file: str, folder: Path) -> Cut:
    """The cut of a whole audio file, without a transcript. The folder of the file is the speaker.

    Raises:
        AudioError: the file cannot be used.
    """
    path = folder / file
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise AudioError("undecodable", "its name is not UTF-8: rename it") from None
    try:
        soundfile.info(path)  # for its error message: Lhotse reports the error of the last library that it tried
        recording = Recording.from_file(path, recording_id=identifier_of(file))
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
