"""Read transcripts with times: CTM, TextGrid, SubRip (.srt), WebVTT, and JSON with words."""

from __future__ import annotations

import codecs
import html
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.corpora.segments import Timed
from w2vscale.corpora.text_files import text_of_file
from w2vscale.errors import UserError

SILENCES = {"", "sp", "sil", "<eps>", "<sil>", "SIL"}  # labels of pauses in TextGrid and CTM files of aligners
TOUCHING = 0.002  # seconds between two cues that follow each other without a pause: times are rounded
BRIEF = 0.05  # seconds of a cue in which nothing is said
ROLLED = "lines of rolling captions that repeat the cue before, which are dropped"
WORD_KEYS = ("word", "text", "label", "token")
TIME = r"(?:(\d+):)?(\d+):(\d+)(?:[.,](\d+))?"
CUE = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}(?:\s|$)")
SPACES_BEFORE_CUE = re.compile(r"^[^\S\n]+$(?=\n(?:[^\S\n]*\d+[^\S\n]*\n)?[^\n]*-->)", re.MULTILINE)
NOT_A_CUE = re.compile(r"(NOTE|STYLE|REGION)(\s|$)")  # at the beginning of a block of WebVTT
MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")
TOKEN = re.compile(r'"(?:[^"]|"")*"|(?<![\w\[])[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?![\w\]])|<exists>')


def read_timed(path: Path, *, encoding: str | None = None, notes: Counter[str] | None = None) -> list[Timed] | None:
    """The words or phrases of a transcript file, sorted by time. None for a JSON file that is no transcript.

    Lines that are dropped are counted in `notes`. Raises UserError, naming file and line, if the file cannot be read or
    has another form.
    """
    text = text_of_file(path, encoding=encoding)
    parse = PARSERS[path.suffix.lower()]
    try:
        units = parse(text, path, Counter() if notes is None else notes)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a {path.suffix[1:]} transcript: {' '.join(str(error).split())[:200]}") from None
    if units is None:
        return None
    return _sorted(units, path)


def check_encoding(name: str) -> None:
    """Raise UserError if there is no encoding of this name."""
    try:
        codecs.lookup(name)
    except (LookupError, ValueError):  # ValueError: a null character in it
        raise UserError(f"--encoding {name}: no encoding has this name; try for example latin-1 or cp1252") from None


def _sorted(units: list[Timed], path: Path) -> list[Timed]:
    """The same by time. Raises UserError if a time is impossible."""
    for unit in units:
        if not 0.0 <= unit.start <= unit.end < math.inf:
            raise UserError(f"{path}: {(unit.text or '')[:40]!r} lasts from {unit.start:g} to {unit.end:g} s")
    return sorted(units, key=lambda unit: unit[:2])


def _ctm(text: str, path: Path, notes: Counter[str]) -> list[Timed]:
    """NIST's format: recording, channel, start, duration, word."""
    by_recording: dict[str, list[Timed]] = defaultdict(list)
    channels = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        try:
            recording, channel, start, duration, word = line.split()[:5]
            unit = Timed(float(start), float(start) + float(duration), word, channel)
        except ValueError:
            raise UserError(f"{path}: line {number} is not: recording channel start duration word") from None
        by_recording[recording].append(unit)
        channels.add(channel)
    first = 0 if "0" in channels else 1  # NIST counts from 1, Lhotse from 0
    if len(by_recording) > 1 and path.stem not in by_recording:
        raise UserError(f"{path}: has the recordings {', '.join(sorted(by_recording)[:5])}, but not {path.stem}")
    units = by_recording[path.stem] if path.stem in by_recording else [*by_recording.values(), []][0]
    return [unit._replace(channel=_channel(str(unit.channel), first)) for unit in units if unit.text not in SILENCES]


def _channel(name: str, first: int) -> int | str:
    """The number of a channel, from 0, of its letter (A is the first) or number; other names are kept."""
    if name.isdecimal():
        return int(name) - first
    return ord(name.upper()) - ord("A") if name.isascii() and name.isalpha() and len(name) == 1 else name


def _text_grid(text: str, path: Path, notes: Counter[str]) -> list[Timed]:
    """Praat's format, long or short. Takes the tiers whose names end with `word` or `words`, or the only one."""
    tiers = dict(_interval_tiers(text))
    words = [name for name in tiers if name.strip().lower().endswith(("word", "words"))]
    if not words and len(tiers) != 1:
        raise UserError(f"{path}: has the tiers {', '.join(tiers) or '(none)'}; name the one with the words: words")
    return [unit for name in words or tiers for unit in tiers[name] if unit.text not in SILENCES]


def _interval_tiers(text: str) -> Iterator[tuple[str, list[Timed]]]:
    """The name and intervals of each interval tier of a TextGrid."""
    tokens = iter(TOKEN.findall(text))

    def token(quoted: bool) -> str:
        for found in tokens:
            if (found[0] == '"') == quoted and found != "<exists>":
                return found
        raise ValueError("it ends early")

    def string() -> str:
        return token(True)[1:-1].replace('""', '"')

    def number() -> float:
        return float(token(False))

    if [string(), string()] != ["ooTextFile", "TextGrid"]:
        raise ValueError("it does not begin as a TextGrid of Praat")
    number(), number()
    for _ in range(int(number())):
        kind, name = string(), string()
        number(), number()
        size = int(number())
        if kind == "IntervalTier":
            yield name, [Timed(number(), number(), string().strip()) for _ in range(size)]
        else:
            for _ in range(size):
                number(), string()


class _Cue(NamedTuple):
    start: float
    end: float
    lines: list[str]


def _subtitles(text: str, path: Path, notes: Counter[str]) -> list[Timed]:
    """SubRip and WebVTT: a line with two times, then lines of text up to an empty line."""
    cues = _cues(text, path)
    if not cues and text.strip() and not text.startswith("WEBVTT"):
        raise ValueError("it has no line such as 00:00:01,000 --> 00:00:02,500")
    return [Timed(cue.start, cue.end, " ".join(cue.lines)) for cue in _without_rolled_lines(cues, notes)]


def _without_rolled_lines(cues: Iterable[_Cue], notes: Counter[str]) -> Iterator[_Cue]:
    """Leave out the lines that a cue shows again from the one directly before, as the captions of YouTube do.

    There, a cue of one or two seconds adds a line below the last line of the cue before, and one of 10 ms follows,
    which shows that line alone. What is said twice stays: a cue that adds nothing is left out only if it is brief.
    """
    before = _Cue(-math.inf, -math.inf, [])
    for cue in cues:
        rolled = 0
        if before.start <= cue.start <= before.end + TOUCHING:
            lengths = range(min(len(before.lines), len(cue.lines)), 0, -1)
            rolled = next((n for n in lengths if before.lines[-n:] == cue.lines[:n]), 0)
        adds_nothing = rolled > 0 and rolled == len(cue.lines)
        before = cue
        if adds_nothing and cue.end - cue.start > BRIEF:
            yield cue
            continue
        notes[ROLLED] += rolled
        if not adds_nothing:
            yield cue._replace(lines=cue.lines[rolled:])


def _cues(text: str, path: Path) -> list[_Cue]:
    """The cues of a file. Raises UserError if a line has --> but does not begin a cue."""
    cues: list[_Cue] = []
    in_cue = in_other_block = False
    # A line of spaces ends a cue only before another one: the captions of YouTube have such lines in cues.
    lines = SPACES_BEFORE_CUE.sub("", text.replace("\r\n", "\n")).split("\n")
    for number, (before, line) in enumerate(pairwise(["", *lines]), start=1):
        if not line:
            in_cue = in_other_block = False
        elif in_other_block or (not before and path.suffix.lower() == ".vtt" and NOT_A_CUE.match(line)):
            in_other_block = True
        elif "-->" in line:
            times = CUE.match(line)
            if times is None or in_cue:
                reason = "must follow an empty line" if in_cue else "is not like 00:00:01,000 --> 00:00:02,500"
                raise UserError(f"{path}: line {number}, {line.strip()[:80]!r}, {reason}")
            first, last = (_seconds(*times.groups()[start : start + 4]) for start in (0, 4))
            cues.append(_Cue(first, last, []))
            in_cue = True
        elif in_cue and (spoken := " ".join(html.unescape(MARKUP.sub("", line)).split())):
            cues[-1].lines.append(spoken)
        elif not in_cue and path.suffix.lower() == ".srt" and not line.strip().isdecimal() and line.strip():
            raise UserError(f"{path}: line {number}, {line.strip()[:80]!r}, is in no cue: an empty line ends a cue")
    return cues


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(f"{int(seconds)}.{fraction or 0}")


def _json(text: str, path: Path, notes: Counter[str]) -> list[Timed] | None:
    """Whisper's and similar forms: words, or segments with or without words; else this file is no transcript."""
    document = json.loads(text)
    units = document
    if isinstance(document, dict):
        lists = (document.get(key) for key in ("words", "segments"))
        units = next((found for found in lists if found and isinstance(found, list)), None)
    if not units or not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        return None
    found = []
    for unit in units:
        listed = unit.get("words")
        words = [_timed(word) for word in listed] if isinstance(listed, list) else []
        whole = _timed(unit)
        if words and None not in words:
            found += words
        elif whole is not None:
            found.append(whole)
        else:
            return None
    return [unit for unit in found if unit is not None]


def _timed(unit: Any) -> Timed | None:
    """A word or segment of a JSON document, if it has text and times."""
    if not isinstance(unit, dict):
        return None
    text = next((unit[key] for key in WORD_KEYS if isinstance(unit.get(key), str)), None)
    start, end = (unit.get(key, unit.get(f"{key}_time")) for key in ("start", "end"))
    if end is None and isinstance(start, int | float) and isinstance(unit.get("duration"), int | float):
        end = start + unit["duration"]
    if text is None or not isinstance(start, int | float) or not isinstance(end, int | float):
        return None
    return Timed(float(start), float(end), text.strip())


PARSERS: dict[str, Callable[[str, Path, Counter[str]], list[Timed] | None]] = {
    ".ctm": _ctm,
    ".textgrid": _text_grid,
    ".srt": _subtitles,
    ".vtt": _subtitles,
    ".json": _json,
}
