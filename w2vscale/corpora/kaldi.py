"""Read the files of Kaldi's data folders: tables such as `text`, and `segments`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.segments import Timed
from w2vscale.corpora.text_files import lines_of_file
from w2vscale.errors import UserError

WITHOUT_TEXT = "utterances without a transcript, whose words are unknown"
WITHOUT_UTTERANCE = "lines of the file `text` that belong to no utterance, and are not used"


class KaldiSegment(NamedTuple):
    """A line of `segments`."""

    name: str
    recording: str
    start: float  # seconds
    end: float  # infinite: the end of the recording
    channel: int | None  # from 0, as Kaldi's extract-segments counts; None: not given


def read_table(path: Path, *, encoding: str | None = None) -> dict[str, str] | None:
    """The rest of each line by its first word; None if there is no such file. UserError if a first word repeats."""
    if not path.is_file():
        return None
    table: dict[str, str] = {}
    for number, line in enumerate(lines_of_file(path, encoding=encoding), start=1):
        if line:
            first, rest = [*line.split(maxsplit=1), ""][:2]
            if first in table:
                raise UserError(f"{path}: line {number}: {first} occurs twice")
            table[first] = rest
    return table


def read_segments(
    path: Path, *, encoding: str | None = None, unusable: list[Unusable] | None = None
) -> list[KaldiSegment]:
    """The lines of `segments`. Raises UserError if one has another form, or two have the same name.

    With `unusable`, such lines are added to it instead. Whether the times are possible is not checked.
    """
    segments: dict[str, KaldiSegment] = {}
    for number, line in enumerate(lines_of_file(path, encoding=encoding), start=1):
        if not line:
            continue
        try:
            segment = _segment(*line.split())
            wrong = f"line {number}: the utterance {segment.name} occurs twice" if segment.name in segments else ""
        except (ValueError, TypeError):
            wrong = f"line {number} is not: utterance recording start end [channel]"
        if not wrong:
            segments[segment.name] = segment
        elif unusable is None:
            raise UserError(f"{path}: {wrong}")
        else:
            unusable.append(Unusable(path.name, "line", wrong))
    return [*segments.values()]


def _segment(name: str, recording: str, start: str, end: str, channel: str | None = None) -> KaldiSegment:
    times = float(start), float(end)
    if not all(map(math.isfinite, times)) or not (channel is None or channel.isdecimal()):
        raise ValueError
    number = None if channel is None else int(channel)
    return KaldiSegment(name, recording, times[0], math.inf if times[1] == -1 else times[1], number)


def read_phrases(folder: Path, *, encoding: str | None = None, notes: Counter[str]) -> dict[str, list[Timed]]:
    """The phrases of each recording of `segments` and `text` in a folder, sorted by time; empty if one is missing.

    What is missing in one of them is counted in `notes`. Raises UserError like `read_segments`, or if a time is
    impossible.
    """
    path = folder / "segments"
    texts = read_table(folder / "text", encoding=encoding)
    if texts is None or not path.is_file():
        return {}
    segments = read_segments(path, encoding=encoding)
    found = defaultdict(list)
    for name, recording, start, end, channel in segments:
        if not 0.0 <= start <= end:
            raise UserError(f"{path}: {name} lasts from {start:g} to {end:g} s")
        found[recording].append(Timed(start, end, texts.get(name), channel))
    count_differences(texts, {segment.name for segment in segments}, notes)
    return {recording: sorted(phrases, key=lambda phrase: phrase[:2]) for recording, phrases in found.items()}


def count_differences(texts: dict[str, str], utterances: set[str], notes: Counter[str]) -> None:
    """Count the utterances without text, and texts without utterance."""
    notes[WITHOUT_TEXT] += len(utterances - texts.keys())
    notes[WITHOUT_UTTERANCE] += len(texts.keys() - utterances)
