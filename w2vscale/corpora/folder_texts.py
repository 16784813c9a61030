"""What is said in the recordings of a folder, and in their segments."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from w2vscale.corpora.finding import PREFERRED, TRANSCRIPT, AudioFile, identifier_of
from w2vscale.corpora.kaldi import read_phrases
from w2vscale.corpora.segments import BEYOND_SEGMENT, Segment, Timed, near_to, words_of
from w2vscale.corpora.text_files import text_of_file
from w2vscale.corpora.timed_text import check_encoding, read_timed
from w2vscale.errors import UserError

START_AFTER_AUDIO = 1.0  # seconds after the end of a recording; words that begin later are of another recording

# Notes for the report.
WITHOUT_TIMES = "segments without text, because the transcript of their recording has no times"
OVERHANGING = "segments without text, because a word or phrase of it extends beyond the segment"
OUTSIDE = "words or phrases in no segment, because no speech was found there"
AFTER_AUDIO = "words or phrases that begin after the end of their recording, which are left out"
PAST_AUDIO = "words or phrases that end after the end of their recording, which are used"
EMPTY = "recordings whose transcript is empty"
NOT_AMONG = "recordings in the file `segments` that are not among the audio files"
AMBIGUOUS = (
    "recordings in the file `segments` that may be several audio files; use their paths, such as a-talk for a/talk"
)
MIXED_CHANNELS = "recordings with the words of several channels mixed by time"
OTHER_CHANNELS = "recordings without text, because the words in their transcript are all of other channels"


# What becomes of a file beside the audio, besides `TRANSCRIPT` and `PREFERRED`.
NOT_A_TRANSCRIPT = "no transcript: it has no words with times"
IN_SEGMENTS = "the files `segments` and `text` of the folder are used instead"
ITS_AUDIO = "its audio file is left out"


class TranscriptError(UserError):
    """A transcript cannot be used. The message has its path below the folder, and the reason."""


class Transcript(NamedTuple):
    """What is said in a recording: words or phrases with times, or else a text without times, or nothing is known."""

    units: Sequence[Timed] | None = None  # sorted by time
    text: str | None = None
    files: Sequence[tuple[str, str]] = ()  # beside the audio: the suffix, and what became of it

    def whole(self) -> str | None:
        """The text of the whole recording, if it is known."""
        return self.text if self.units is None else _joined(self.units)

    def of_segments(self, segments: Sequence[Segment], notes: Counter[str]) -> list[str | None]:
        """The text of each segment of the recording; None where it is not known."""
        if self.units is None:
            if len(segments) == 1:  # it has all of the speech
                return [self.text]
            notes[WITHOUT_TIMES] += len(segments) if self.text else 0
            return [None] * len(segments)
        texts: list[str | None] = []
        outside, near = len(self.units), near_to(self.units)
        for segment in segments:
            words, partly = words_of(segment, near(segment))
            outside -= len(words)
            notes[OVERHANGING] += bool(partly)
            texts.append(None if partly else _joined(words))
        notes[OUTSIDE] += outside
        return texts


@dataclass(frozen=True)
class Transcripts:
    """The transcripts of the recordings of a folder. Each is read when it is asked for."""

    folder: Path
    beside: dict[str, AudioFile]  # audio files with a transcript beside them, by their path
    phrases: dict[str, list[Timed]]  # of Kaldi's files `segments` and `text`, by audio file
    shared: frozenset[str]  # audio files whose transcripts are also those of an earlier one, which counts them
    encoding: str | None = None

    @classmethod
    def find(
        cls, folder: Path, files: Sequence[AudioFile], notes: Counter[str], *, encoding: str | None = None
    ) -> Transcripts:
        """The transcripts of the audio files of a folder. Raises UserError if Kaldi's files in it cannot be used."""
        if encoding is not None:
            check_encoding(encoding)
        phrases = read_phrases(folder, encoding=encoding, notes=notes)
        by_file = _by_file(phrases, [file.path for file in files], notes)
        beside = {file.path: file for file in files if file.suffixes}
        owners = {file.transcripts[0]: file.path for file in reversed(beside.values())}
        return cls(folder, beside, by_file, frozenset(beside.keys() - owners.values()), encoding)

    def left_out_with(self, file: str) -> list[tuple[str, str]]:
        """What becomes of the transcripts beside an audio file that is left out, by their suffixes."""
        suffixes = () if file in self.shared else self.beside.get(file, AudioFile(file)).suffixes
        return [(suffix.lower(), ITS_AUDIO) for suffix in suffixes]

    def of(self, file: str, duration: float, notes: Counter[str], *, channels: int, channel: int | None) -> Transcript:
        """The transcript of an audio file of `duration` seconds, of whose `channels` one is used, or the mean (None).

        Raises TranscriptError if it cannot be used.
        """
        found = self._read(file, duration, notes)
        notes[EMPTY] += found.whole() == ""
        found = found._replace(files=()) if file in self.shared else found
        return found._replace(units=_in_channel(found.units, channels, channel, notes)) if found.units else found

    def _read(self, file: str, duration: float, notes: Counter[str]) -> Transcript:
        beside = self.beside.get(file, AudioFile(file))
        suffixes = [suffix.lower() for suffix in beside.suffixes]
        if file in self.phrases:
            units = _within(self.phrases[file], duration, "segments", notes)
            return Transcript(units, files=[(suffix, IN_SEGMENTS) for suffix in suffixes])
        files = list[tuple[str, str]]()
        for suffix, path in zip(suffixes, beside.transcripts, strict=True):
            found = self._read_file(path, duration, notes)
            if found != Transcript():
                rest = [(other, PREFERRED) for other in suffixes[len(files) + 1 :]]
                return found._replace(files=[*files, (suffix, TRANSCRIPT), *rest])
            files.append((suffix, NOT_A_TRANSCRIPT))
        return Transcript(files=files)

    def _read_file(self, path: str, duration: float, notes: Counter[str]) -> Transcript:
        """What a file says; nothing is known if it is JSON and no transcript."""
        try:
            if path.lower().endswith(".txt"):
                return Transcript(text=text_of_file(self.folder / path, encoding=self.encoding).strip())
            units = read_timed(self.folder / path, encoding=self.encoding, notes=notes)
        except UserError as error:
            raise TranscriptError(f"{path}: {str(error).removeprefix(f'{self.folder / path}: ')}") from None
        return Transcript(None if units is None else _within(units, duration, path, notes))


def _by_file(phrases: dict[str, list[Timed]], files: Sequence[str], notes: Counter[str]) -> dict[str, list[Timed]]:
    """The phrases of each audio file. The recordings of others, and those that may be several files, are counted.

    A recording has the id of its file, or the name of its file without the folder if no other file has it.
    """
    of_id, of_name = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for file in files if phrases else ():
        of_id[identifier_of(file)].append(file)
        of_name[identifier_of(os.path.basename(file))].append(file)
    by_id, by_name = dict[str, list[Timed]](), dict[str, list[Timed]]()
    for recording, units in phrases.items():
        matching = of_id.get(recording) or of_name.get(recording) or []
        if len(matching) == 1:
            (by_id if recording in of_id else by_name)[matching[0]] = units
        else:
            notes[AMBIGUOUS if matching else NOT_AMONG] += 1
    notes[NOT_AMONG] += len(by_id.keys() & by_name.keys())  # another recording has the id of the file
    return {**by_name, **by_id}


def _joined(units: Sequence[Timed]) -> str | None:
    """The text of some words or phrases; None if that of one is unknown."""
    text = ""
    for unit in units:
        if unit.text is None:
            return None
        text += unit.text if unit.joined or not unit.text else f" {unit.text}"
    return text.strip()


def _in_channel(
    units: Sequence[Timed], channels: int, channel: int | None, notes: Counter[str]
) -> Sequence[Timed] | None:
    """The words that are said in the channel that is used of `channels`; None if those of others alone are known."""
    if channel is None or channels == 1:
        notes[MIXED_CHANNELS] += len({unit.channel for unit in units} - {None}) > 1
        return units
    found = [unit for unit in units if unit.channel in (None, channel)]
    notes[OTHER_CHANNELS] += not found
    return found or None


def _within(units: Sequence[Timed], duration: float, path: str, notes: Counter[str]) -> Sequence[Timed]:
    """The words within a recording of `duration` seconds, up to its end. Times are inexact: some go a little beyond.

    Raises TranscriptError if one begins much later.
    """
    if units and units[-1].start > duration + START_AFTER_AUDIO:
        raise TranscriptError(f"{path}: has words at {units[-1].start:.1f} s, but the audio ends at {duration:.1f} s")
    found = [unit._replace(end=min(unit.end, duration)) for unit in units if unit.start < duration]
    notes[AFTER_AUDIO] += len(units) - len(found)
    notes[PAST_AUDIO] += sum(duration + BEYOND_SEGMENT < unit.end < math.inf for unit in units[: len(found)])
    return found
