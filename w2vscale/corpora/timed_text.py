"""Read transcripts with times: CTM, TextGrid, SubRip (.srt), WebVTT, and JSON with words."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
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
OTHER_NAME = "files .ctm whose only recording has another name than the audio file, which are used for it"
OTHER_RECORDINGS = "lines of files .ctm that are of other recordings, which are not used"
OTHER_WORDS = "lists of words in JSON files that are not the words of the text beside them"
WORD_KEYS = ("word", "text", "label", "token")
WORD_TIER = re.compile(r"(^|[^a-z])words?$", re.IGNORECASE)
TIME = r"(?:(\d+):)?(\d+):([0-5]?\d)(?:[.,](\d+))?"
CUE = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}(?:\s|$)")
SPACES_BEFORE_CUE = re.compile(r"^[^\S\n]+$(?=\n(?:[^\S\n]*\d+[^\S\n]*\n)?[^\n]*-->)", re.MULTILINE)
NOT_A_CUE = re.compile(r"(NOTE|STYLE|REGION)(\s|$)")  # at the beginning of a block of WebVTT
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^}]*\}")
ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]+\d*);")
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
        "a".encode(name)
    except (LookupError, ValueError):  # ValueError: a null character in it, or no text
        raise UserError(f"--encoding {name}: no encoding has this name; try for example latin-1 or cp1252") from None


def _sorted(units: list[Timed], path: Path) -> list[Timed]:
    """The same by time. Raises UserError if a time is impossible."""
    for unit in units:
        if not (0.0 <= unit.start <= unit.end and unit.start < math.inf):
            raise UserError(f"{path}: {(unit.text or '')[:40]!r} lasts from {unit.start:g} to {unit.end:g} s")
    return sorted(units, key=lambda unit: unit[:2])


def _ctm(text: str, path: Path, notes: Counter[str]) -> list[Timed]:
    """NIST's format: recording, channel, start, duration, word, and perhaps its confidence and more."""
    by_recording: dict[str, list[Timed]] = defaultdict(list)
    channels = set()
    for number, line in enumerate(text.split("\n"), start=1):
        fields = re.findall(r"[^ \t\r]+", line)  # a word may have a no-break space
        if not fields or line.startswith(";;"):
            continue
        try:
            recording, channel, start, duration, word = fields[:5]
            unit = Timed(float(start), float(start) + float(duration), word, channel)
            if fields[5:6] not in ([], ["NA"]):
                float(fields[5])
        except ValueError:
            form = "recording channel start duration word [confidence]"
            raise UserError(f"{path}: line {number} is not: {form}") from None
        by_recording[recording].append(unit)
        channels.add(channel)
    first = 0 if "0" in channels else 1  # NIST counts from 1, Lhotse from 0
    if len(by_recording) > 1 and path.stem not in by_recording:
        raise UserError(f"{path}: has the recordings {', '.join(sorted(by_recording)[:5])}, but not {path.stem}")
    notes[OTHER_NAME] += len(by_recording) == 1 and path.stem not in by_recording
    units = by_recording[path.stem] if path.stem in by_recording else [*by_recording.values(), []][0]
    notes[OTHER_RECORDINGS] += sum(map(len, by_recording.values())) - len(units)
    return [unit._replace(channel=_channel(str(unit.channel), first)) for unit in units if unit.text not in SILENCES]


def _channel(name: str, first: int) -> int | str:
    """The number of a channel, from 0, of its letter (A is the first) or number; other names are kept."""
    if name.isdecimal():
        return int(name) - first
    return ord(name.upper()) - ord("A") if name.isascii() and name.isalpha() and len(name) == 1 else name


def _text_grid(text: str, path: Path, notes: Counter[str]) -> list[Timed]:
    """Praat's format, long or short. Takes the tiers whose last word is `words` or `word`, or the only tier."""
    tiers = [*_interval_tiers(text)]
    words = [tier for tier in tiers if WORD_TIER.search(tier[0].strip())]
    if not words and len(tiers) != 1:
        names = ", ".join(name for name, _ in tiers) or "(none)"
        raise UserError(f"{path}: has the tiers {names}; name the one with the words: words")
    return [unit for _, units in words or tiers for unit in units if unit.text not in SILENCES]


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


def _without_rolled_lines(cues: Sequence[_Cue], notes: Counter[str]) -> Iterator[_Cue]:
    """Leave out the lines that a cue shows again from the one directly before, as the captions of YouTube do.

    There, a cue of one or two seconds adds a line below the last line of the cue before, and one of 10 ms follows,
    which shows that line alone. A speaker may also say a line twice. So a longer cue is kept, even if all of its lines
    are repeated. Nothing is dropped if fewer than half of the cues that follow without a pause repeat a line.
    """
    pairs = [*pairwise([_Cue(-math.inf, -math.inf, []), *cues])]
    touching = [before.start <= cue.start <= before.end + TOUCHING for before, cue in pairs]
    rolled = [
        _repeated(before.lines, cue.lines) if touches else 0
        for touches, (before, cue) in zip(touching, pairs, strict=True)
    ]
    if 2 * sum(map(bool, rolled)) < sum(touching):
        yield from cues
        return
    for cue, repeated in zip(cues, rolled, strict=True):
        adds_nothing = 0 < repeated == len(cue.lines)
        if adds_nothing and cue.end - cue.start > BRIEF:
            yield cue
            continue
        notes[ROLLED] += repeated
        if not adds_nothing:
            yield cue._replace(lines=cue.lines[repeated:])


def _repeated(before: Sequence[str], lines: Sequence[str]) -> int:
    """How many lines at the end of a cue are also at the beginning of the next one."""
    return next((n for n in range(min(len(before), len(lines)), 0, -1) if before[-n:] == lines[:n]), 0)


def _cues(text: str, path: Path) -> list[_Cue]:
    """The cues of a file. Raises UserError if a line has --> but does not begin a cue, or is in no cue."""
    cues: list[_Cue] = []
    is_vtt = path.suffix.lower() == ".vtt"
    in_cue, in_other_block = False, is_vtt and text.startswith("WEBVTT")
    # A line of spaces ends a cue only before another one: the captions of YouTube have such lines in cues.
    lines = SPACES_BEFORE_CUE.sub("", text.replace("\r\n", "\n")).split("\n")
    around = zip(["", *lines], lines, [*lines[1:], ""], strict=False)
    for number, (before, line, after) in enumerate(around, start=1):
        if not line:
            in_cue = in_other_block = False
        elif in_other_block or (is_vtt and not before and NOT_A_CUE.match(line)):
            in_other_block = True
        elif "-->" in line:
            times = CUE.match(line)
            if times is None or in_cue:
                reason = "must follow an empty line" if in_cue else "is not like 00:00:01,000 --> 00:00:02,500"
                raise UserError(f"{path}: line {number}, {line.strip()[:80]!r}, {reason}")
            first, last = (_seconds(*times.groups()[start : start + 4]) for start in (0, 4))
            cues.append(_Cue(first, last, []))
            in_cue = True
        elif in_cue:
            cues[-1].lines.extend(filter(None, [_spoken(line)]))
        elif line.strip() and not (after.strip() if line.strip().isdecimal() else is_vtt and "-->" in after):
            raise UserError(f"{path}: line {number}, {line.strip()[:80]!r}, is in no cue: an empty line ends a cue")
    return cues


def _spoken(line: str) -> str:
    """A line of a cue without markup."""
    return " ".join(ENTITY.sub(lambda found: html.unescape(found[0]), MARKUP.sub("", line)).split())


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(f"{int(seconds)}.{fraction or 0}")


def _json(text: str, path: Path, notes: Counter[str]) -> list[Timed] | None:
    """Whisper's and similar forms: words, or segments with or without words; else this file is no transcript."""
    document = json.loads(text)
    if isinstance(document, list):
        are_words = any(isinstance(unit, dict) and "word" in unit for unit in document)
        document = {"words" if are_words else "segments": document}
    if not isinstance(document, dict):
        return None
    words = _words(document.get("words"))
    if words is not None and (spelled := _spelled(words, document.get("text"))) is not None:
        return spelled
    notes[OTHER_WORDS] += words is not None
    segments = _segments(document.get("segments") or document.get("chunks"), notes)
    if segments is None and words is None:
        return _segments(document.get("words"), notes)  # names the word without times
    return _spelled(words, None) if segments is None and words is not None else segments


def _segments(listed: Any, notes: Counter[str]) -> list[Timed] | None:
    """The words of segments; a segment is one phrase if its words are not known. None if these are no segments.

    Raises ValueError if one of them has no times.
    """
    if not isinstance(listed, list) or not listed:
        return None
    found, without = list[Timed](), ""
    for number, segment in enumerate(listed, start=1):
        whole = _timed(segment)
        words = _words(segment.get("words")) if isinstance(segment, dict) else None
        spelled = None if words is None else _spelled(words, None if whole is None else whole.text)
        notes[OTHER_WORDS] += words is not None and spelled is None
        if spelled is not None:
            found += spelled
        elif whole is not None:
            found.append(whole._replace(text=str(whole.text).strip()))
        else:
            without = without or f"number {number} has no text or no times: {str(segment)[:80]}"
    if found and without:
        raise ValueError(without)
    return found or None


def _words(listed: Any) -> list[Timed] | None:
    """Words with their white space; None if one has no times, or there are none."""
    words = [_timed(word) for word in listed] if isinstance(listed, list) else []
    return [word for word in words if word is not None] if words and None not in words else None


def _timed(unit: Any) -> Timed | None:
    """A word or segment of a JSON document with its white space, if it has text and times.

    The last segment of a pipeline of Transformers may have no end: its timestamp is [start, null].
    """
    if not isinstance(unit, dict):
        return None
    text = next((unit[key] for key in WORD_KEYS if isinstance(unit.get(key), str)), None)
    start, end = (unit.get(key, unit.get(f"{key}_time")) for key in ("start", "end"))
    if isinstance(unit.get("timestamp"), list) and len(unit["timestamp"]) == 2:
        start, end = unit["timestamp"]
        end = math.inf if end is None else end
    if end is None and isinstance(start, int | float) and isinstance(unit.get("duration"), int | float):
        end = start + unit["duration"]
    if text is None or not isinstance(start, int | float) or not isinstance(end, int | float):
        return None
    return Timed(float(start), float(end), text)


def _spelled(words: Sequence[Timed], text: Any) -> list[Timed] | None:
    """Words as they are written in their text, with what is between them. None if it has others.

    Without a text, words have spaces between them, unless some have their own, as those of Whisper.
    """
    raw = [word.text or "" for word in words]
    if not isinstance(text, str) or not text.strip():
        has_spaces = any(word[:1].isspace() for word in raw)
        joined = [has_spaces and not word[:1].isspace() for word in raw]
        return [
            unit._replace(text=word.strip(), joined=one) for unit, word, one in zip(words, raw, joined, strict=True)
        ]
    places, end = list[int](), 0
    for word in map(str.strip, raw):
        place = text.find(word, end)
        if place < 0 or any(map(str.isalnum, text[end:place])):
            return None
        places.append(place)
        end = place + len(word)
    if any(map(str.isalnum, text[end:])):
        return None
    parts = [text[start:end] for start, end in pairwise([0, *places[1:], len(text)])]
    joined = [False, *(not part[-1:].isspace() for part in parts[:-1])]
    return [unit._replace(text=part.strip(), joined=one) for unit, part, one in zip(words, parts, joined, strict=True)]


PARSERS: dict[str, Callable[[str, Path, Counter[str]], list[Timed] | None]] = {
    ".ctm": _ctm,
    ".textgrid": _text_grid,
    ".srt": _subtitles,
    ".vtt": _subtitles,
    ".json": _json,
}
