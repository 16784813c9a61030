"""Where to cut long recordings, and which words each segment has. All times are in seconds."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import frexp
from typing import NamedTuple

SHORTEST = 2.0  # seconds of a segment of speech, unless its recording is shorter
LEAST = 0.01  # seconds of any segment that ends in a pause
LONGEST_PAUSE = 0.5  # seconds; longer pauses are left out between segments of speech
ROUNDING = 1e-3  # seconds by which times are not exact
BEYOND_SEGMENT = 0.25  # seconds by which a word or phrase may extend beyond its segment


class Timed(NamedTuple):
    """A word or phrase with its times."""

    start: float
    end: float
    text: str | None  # None: it is not known what is said
    channel: int | str | None = None  # from 0, or a name that is not a number or letter; None: of all channels
    joined: bool = False  # written without a space after the one before


class Segment(NamedTuple):
    """A part of a recording."""

    start: float
    end: float


def windows(duration: float, longest: float, units: Sequence[Timed] = ()) -> list[Segment]:
    """Cut a recording every `longest` seconds, or in the last pause before, so that no word or phrase is cut.

    `units` are sorted by time. Nothing of the recording is left out. A unit is cut only if it is longer than `longest`,
    or if it overlaps with others.
    """
    pauses = [*_pauses(units)]
    near, ends_of_pauses = near_to(units), [after for _, after in pauses]
    segments, start = list[Segment](), 0.0
    while duration - start > longest:
        end = start + longest
        if cut := [unit.end for unit in near(Segment(end, end)) if unit.start < end < unit.end]:
            before, after = pauses[bisect_left(ends_of_pauses, end) - 1]
            middle = (max(before, start) + after) / 2
            if before < start and max(cut) > middle + longest:  # or one pause would be cut again and again
                middle = after
            end = middle if start + LEAST < middle < end else end
        segments.append(Segment(start, end))
        start = end
    return [*segments, Segment(start, duration)]


def segments_of_speech(speech: Sequence[Segment], duration: float, longest: float) -> list[Segment]:
    """Cut a recording in its pauses: segments of `SHORTEST` to `longest` seconds with all of its speech.

    `speech` is sorted and does not overlap. Pauses above `LONGEST_PAUSE` are left out, except beside speech that is
    shorter than `SHORTEST`. Speech without a pause is cut after `longest` seconds, which are at least 2 * `SHORTEST`.
    """
    assert longest >= 2 * SHORTEST
    joined: list[Segment] = []
    for part in speech:
        start, end = _at_least(SHORTEST, part, duration)
        if joined and start - joined[-1].end <= LONGEST_PAUSE:
            start, end = joined[-1].start, max(end, joined.pop().end)
        joined.append(Segment(start, end))
    pauses = [(one.end + other.start) / 2 for one, other in pairwise(speech)]
    segments = []
    for start, end in joined:
        while end - start > longest:
            last = min(start + longest, end - SHORTEST)
            number = bisect_right(pauses, last) - 1
            cut = pauses[number] if number >= 0 and pauses[number] >= start + SHORTEST else last
            segments.append(Segment(start, cut))
            start = cut
        segments.append(Segment(start, end))
    return segments


def near_to(units: Sequence[Timed]) -> Callable[[Segment], Sequence[Timed]]:
    """A function that quickly selects those of `units`, sorted by time, that may overlap with a segment."""
    of_length: dict[int, list[Timed]] = defaultdict(list)  # so that one long phrase does not slow down all searches
    for unit in units:
        of_length[frexp(unit.end - unit.start)[1]].append(unit)
    groups = [
        (some, [unit.start for unit in some], max(unit.end - unit.start for unit in some))
        for some in of_length.values()
    ]

    def near(segment: Segment) -> Sequence[Timed]:
        found: list[Timed] = []
        for some, starts, longest in groups:
            found += some[bisect_left(starts, segment.start - longest) : bisect_right(starts, segment.end)]
        return sorted(found, key=lambda unit: unit[:2])

    return near


def words_of(segment: Segment, units: Sequence[Timed]) -> tuple[list[Timed], list[Timed]]:
    """The words or phrases of which a segment has the middle, and those of them or of others that it has only in part.

    `units` are sorted by time.
    """
    inside = [unit for unit in units if segment.start <= (unit.start + unit.end) / 2 < segment.end]
    partly = [
        unit
        for unit in units
        if (overlap := min(unit.end, segment.end) - max(unit.start, segment.start)) > BEYOND_SEGMENT
        and unit.end - unit.start - overlap > BEYOND_SEGMENT
    ]
    return inside, partly


def _at_least(shortest: float, part: Segment, duration: float) -> Segment:
    """Extend a part on both sides to at least `shortest` seconds, within a recording of `duration` seconds."""
    missing = max(shortest - (part.end - part.start), 0.0)
    start = max(min(part.start - missing / 2, duration - shortest), 0.0)
    return Segment(min(start, part.start), min(max(start + shortest, part.end), duration))


def _pauses(units: Iterable[Timed]) -> Iterator[tuple[float, float]]:
    """Start and end of each pause between words or phrases, which may be empty; also of the one before the first.

    Words may overlap by `ROUNDING`, as 0.1 + 0.2 does with 0.3.
    """
    end = 0.0
    for unit in units:
        if unit.start >= end - ROUNDING:
            yield min(end, unit.start), unit.start
        end = max(end, unit.end)
