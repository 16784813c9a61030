"""Transcripts as text, JSON, SubRip subtitles and NIST CTM. All times are seconds in the recording."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from w2vscale.errors import UserError
from w2vscale.files import write_text
from w2vscale.inference.transcription import TimedWord, Transcript
from w2vscale.inference.utterances import Utterance

FORMATS = ("txt", "json", "srt", "ctm")
LINES = ("txt", "json")
"""Formats with a line per utterance, in any order."""

LINE_CHARACTERS = 42  # of a line of a subtitle, which has at most two
SUBTITLE_SECONDS = 7.0  # longest subtitle
PAUSE_SECONDS = 0.6  # between two words that are not in one subtitle
SHORTEST_SECONDS = 1.0  # of a subtitle, if the next one leaves the time


def check_format(form: str, utterances: Sequence[Utterance], output: Path | None) -> None:
    """Raise UserError if there is no such format, or it needs a folder to write to, or has no use for it."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if form != "srt":
        if output is not None:
            raise UserError(f"--output {output}: only applies to --format srt; {form} is printed, so use > FILE")
        return
    names = sorted({one.recording or one.name for one in utterances})
    if output is None and len(names) > 1:
        raise UserError(
            f"--format srt: a file of subtitles is of one recording, and there are {len(names):,}; add --output DIR"
        )
    if output is not None and (bad := next((name for name in names if not _is_file_name(name)), None)) is not None:
        raise UserError(f"--format srt: the recording id {bad!r} cannot be a file name in the output folder")


def _is_file_name(name: str) -> bool:
    return "\0" not in name and not name.startswith("/") and not {"..", ""} & set(name.split("/"))


def line_of(transcript: Transcript, form: str) -> str:
    """Format an utterance as a line of `txt` (name, tab, text) or `json`."""
    if form == "txt":
        name = transcript.utterance.translate({ord(one): f"\\u{ord(one):04x}" for one in "\t\n"})
        return f"{name}\t{transcript.text}"
    document = {
        "utterance": transcript.utterance,
        "file": transcript.file,
        "start": round(transcript.start, 3),
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "words": [{"word": word.text, **_rounded(word), "score": round(word.score, 4)} for word in transcript.words],
    }
    return json.dumps(document, ensure_ascii=False)


def _rounded(word: TimedWord) -> dict[str, float]:
    start = round(word.start, 3)
    return {"start": start, "duration": round(round(word.start + word.duration, 3) - start, 3)}


def ctm(transcripts: Sequence[Transcript]) -> str:
    """Format transcripts as NIST CTM, sorted as its tools expect: `recording channel start duration word score`.

    Channels are counted from 1. White space in the name of a recording becomes an underscore.
    """
    lines = [
        ("_".join(transcript.recording.split()), transcript.channel + 1, _rounded(word), word)
        for transcript in transcripts
        for word in transcript.words
    ]
    lines.sort(key=lambda line: (line[0], line[1], line[2]["start"]))
    return "".join(
        f"{recording} {channel} {time['start']:.3f} {time['duration']:.3f} {word.text} {word.score:.4f}\n"
        for recording, channel, time, word in lines
    )


def subtitles(transcripts: Sequence[Transcript]) -> str:
    """Format the transcripts of one recording as SubRip: subtitles with a number, times and one or two lines.

    A subtitle ends before a pause of PAUSE_SECONDS, at the end of an utterance, and where the next word would exceed
    two lines or SUBTITLE_SECONDS. It is shown for SHORTEST_SECONDS at least, but not beyond the next one or the audio.
    """
    groups = [
        group for one in sorted(transcripts, key=lambda one: (one.start, one.channel)) for group in _groups(one.words)
    ]
    groups.sort(key=lambda group: group[0].start)
    audio_end = max((one.start + one.duration for one in transcripts), default=0.0)
    starts = [group[0].start for group in groups]
    parts = []
    for number, (group, (start, limit)) in enumerate(zip(groups, pairwise([*starts, audio_end]), strict=True), 1):
        end = max(_end(group[-1]), min(start + SHORTEST_SECONDS, limit))
        lines = "\n".join(_lines(group))
        parts.append(f"{number}\n{_clock(start)} --> {_clock(end)}\n{lines}\n")
    return "\n".join(parts)


def _groups(words: Sequence[TimedWord]) -> list[list[TimedWord]]:
    """Split the words of an utterance into subtitles."""
    groups: list[list[TimedWord]] = []
    for word in words:
        if groups:
            group = groups[-1]
            fits = len(_lines([*group, word])) <= 2 and _end(word) - group[0].start <= SUBTITLE_SECONDS
            if fits and word.start - _end(group[-1]) < PAUSE_SECONDS:
                group.append(word)
                continue
        groups.append([word])
    return groups


def _lines(group: Sequence[TimedWord]) -> list[str]:
    text = " ".join(word.text for word in group)
    return textwrap.wrap(text, LINE_CHARACTERS, break_long_words=False, break_on_hyphens=False)


def _end(word: TimedWord) -> float:
    return word.start + word.duration


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d},{milliseconds:03d}"


def write_subtitles(transcripts: Sequence[Transcript], utterances: Sequence[Utterance], folder: Path) -> list[Path]:
    """Write a file `folder/RECORDING.srt` for each recording, also for one without words. Returns their paths."""
    by_recording: dict[str, list[Transcript]] = {one.recording or one.name: [] for one in utterances}
    for transcript in transcripts:
        by_recording[transcript.recording].append(transcript)
    paths = []
    for recording, found in by_recording.items():
        if found:  # none if its audio cannot be used
            paths.append(folder / f"{recording}.srt")
            write_text(paths[-1], subtitles(found))
    return paths
