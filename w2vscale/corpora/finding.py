"""Find the audio files below a folder with their transcripts, and count everything else that is there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from w2vscale.data.decoding import AUDIO_SUFFIXES, is_audio
from w2vscale.errors import UserError

TEXT_SUFFIXES = (".ctm", ".textgrid", ".srt", ".vtt", ".json", ".txt")
"""Transcripts beside an audio file, in the order in which they are preferred: those with times come first."""

# What `FolderContents.others` says. The transcripts that may be used are counted by who reads them.
TRANSCRIPT = "transcript"
PREFERRED = "another transcript of the audio file is used"
ALONE = "no audio file beside it has its name"
NOT_AUDIO = "not audio"
BROKEN_LINK = "broken link"


class AudioFile(NamedTuple):
    """An audio file, by its path below the folder, and the transcripts beside it.

    There are two if the first is .json, which may be something else than a transcript.
    """

    path: str
    suffixes: Sequence[str] = ()  # of the transcripts, as they are written
    link: str = ""  # a link to the file, if the transcripts are beside that

    @property
    def transcripts(self) -> list[str]:
        """The paths of the transcripts below the folder."""
        return [os.path.splitext(self.link or self.path)[0] + suffix for suffix in self.suffixes]


class Unusable(NamedTuple):
    """An audio file, a transcript or a folder that cannot be used, by its path, and why."""

    path: str
    kind: str  # in a word or two
    reason: str
    units: int = 1  # what is lost, in the unit of the report: files, or utterances of a list


@dataclass
class FolderContents:
    """What is below a folder. The audio files are sorted by the parts of their paths."""

    audio: list[AudioFile] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    others: Counter[tuple[str, str]] = field(default_factory=Counter)  # by suffix and reason
    left_out: list[tuple[str, str]] = field(default_factory=list)  # those with a suffix of audio, and why

    def leave_out(self, path: str, reason: str) -> None:
        """Count an entry that is not used, and list it by its path if its suffix is that of audio."""
        self.others[os.path.splitext(path)[1].lower() or "(no suffix)", reason] += 1
        if is_audio(path):
            self.left_out.append((path, reason))

    def no_audio(self, folder: Path) -> UserError:
        """The error for a folder without usable audio, which says what is there instead."""
        if self.unusable:
            return UserError(f"{folder}: no audio that can be used; {self.unusable[0].path}: {self.unusable[0].reason}")
        others = "; ".join(f"{count:,} {suffix}: {reason}" for (suffix, reason), count in self.others.most_common(5))
        return UserError(f"{folder}: no audio in it ({others or 'it is empty'})")


def find_audio(folder: Path) -> FolderContents:
    """Find the audio files below a folder by their suffixes.

    Symbolic links are followed. What several links lead to is taken once, by its own name if it has one below `folder`,
    so that a loop of links ends; a transcript may be beside any of them. Hidden files are left out: macOS puts files
    such as `._talk.wav`, which are not audio, beside real ones. Raises UserError if the folder itself cannot be read.
    """
    found = FolderContents()
    folders, folder_links = [""], list[str]()
    file_links: list[AudioFile] = []
    visited: dict[str, str] = {}  # folders by their real path, and files that links lead to
    while folders or folder_links:
        below = folders.pop() if folders else folder_links.pop()
        real = os.path.realpath(folder / below)
        if real in visited:
            found.leave_out(below, "link to a folder that is used anyway")
            continue
        visited[real] = below
        try:
            inside = _sorted_entries(folder, below, found)
        except OSError as error:
            if not below:
                raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
            found.unusable.append(Unusable(below, "unreadable", f"cannot be read: {error.strerror}"))
            continue
        for entry in inside.folders:
            (folder_links if entry.is_symlink() else folders).append(f"{below}{entry.name}/")
        for entry in inside.audio:
            texts = _chosen(inside.texts.get(os.path.splitext(entry.name)[0], ()))
            (file_links if entry.is_symlink() else found.audio).append(AudioFile(below + entry.name, texts))
        folder_links.sort(key=lambda path: path.split("/"), reverse=True)
    used = {file.path: file for file in found.audio}
    for file in sorted(file_links):
        place, name = os.path.split(target := os.path.realpath(folder / file.path))
        if place in visited and is_audio(name) and not name.startswith("."):
            visited[target] = visited[place] + name
        if target not in visited:
            visited[target] = file.path
            used[file.path] = file
            continue
        found.leave_out(file.path, "link to a file that is used anyway")
        if (same := used[visited[target]]).suffixes:
            found.others.update((suffix.lower(), PREFERRED) for suffix in file.suffixes)
        elif file.suffixes:
            used[same.path] = same._replace(suffixes=file.suffixes, link=file.path)
    found.audio = sorted(used.values(), key=lambda file: file.path.split("/"))
    return found


class _Entries(NamedTuple):
    """What is in a folder. `texts` are the suffixes of transcripts by stem, in the order of preference."""

    folders: list[os.DirEntry[str]]
    audio: list[os.DirEntry[str]]
    texts: dict[str, list[str]]


def _sorted_entries(folder: Path, below: str, found: FolderContents) -> _Entries:
    """The entries of a folder by what they are; what is not used is also counted in `found`."""
    inside = _Entries([], [], {})
    with os.scandir(folder / below) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            is_link = entry.is_symlink()
            if entry.name.startswith("."):
                found.leave_out(below + entry.name, "hidden")
            elif os.path.isdir(entry) if is_link else entry.is_dir():
                inside.folders.append(entry)
            elif not (os.path.isfile(entry) if is_link else entry.is_file()):
                found.leave_out(below + entry.name, "not a file" if os.path.exists(entry) else BROKEN_LINK)
            elif suffix.lower() in AUDIO_SUFFIXES:
                inside.audio.append(entry)
            elif suffix.lower() in TEXT_SUFFIXES:
                inside.texts.setdefault(stem, []).append(suffix)
            else:
                found.leave_out(below + entry.name, NOT_AUDIO)
    stems = {os.path.splitext(entry.name)[0] for entry in inside.audio}
    for stem, suffixes in inside.texts.items():
        suffixes.sort(key=lambda suffix: (TEXT_SUFFIXES.index(suffix.lower()), suffix))
        chosen = _chosen(suffixes) if stem in stems else ()
        for suffix in suffixes:
            if suffix not in chosen:
                found.leave_out(stem + suffix, PREFERRED if chosen else ALONE)
    return inside


def identifier_of(file: str) -> str:
    """The id of an audio file, from its path below the folder."""
    return os.path.splitext(file)[0].replace("/", "-")


def _chosen(suffixes: Sequence[str]) -> Sequence[str]:
    """The transcripts to use, of those beside an audio file in the order of preference: one, or a .json and a .txt."""
    if len(suffixes) > 1 and suffixes[0].lower() == ".json":
        return [suffixes[0], *[suffix for suffix in suffixes if suffix.lower() == ".txt"][:1]]
    return suffixes[:1]
