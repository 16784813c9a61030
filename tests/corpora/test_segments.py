"""Where recordings are cut, and which words each segment has."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vscale.corpora.segments import (
    LEAST,
    LONGEST_PAUSE,
    ROUNDING,
    SHORTEST,
    Segment,
    Timed,
    near_to,
    segments_of_speech,
    windows,
    words_of,
)

times = st.floats(0, 60, allow_nan=False).map(lambda seconds: round(seconds, 3))


@st.composite
def parts(draw: st.DrawFn, longest: float) -> list[tuple[float, float]]:
    """Sorted parts of a recording that do not overlap."""
    found, end = [], 0.0
    for pause, length in draw(st.lists(st.tuples(st.floats(0, 4), st.floats(0.01, longest)), max_size=30)):
        found.append((end + pause, end + pause + length))
        end += pause + length
    return found


@settings(max_examples=200)
@given(duration=st.floats(0.1, 100), longest=st.floats(0.5, 40), units=parts(5.0))
def test_windows_cover_a_recording_and_cut_no_word_that_fits(
    duration: float, longest: float, units: list[tuple[float, float]]
) -> None:
    words = [Timed(*part, "x") for part in units]
    segments = windows(duration, longest, words)
    assert segments[0].start == 0.0 and segments[-1].end == duration
    assert all(one.end == other.start for one, other in pairwise(segments))
    assert all(0 < segment.end - segment.start <= longest + 1e-9 for segment in segments)
    for cut in (segment.end for segment in segments[:-1]):
        inside = [word for word in words if word.start + ROUNDING < cut < word.end - ROUNDING]
        assert not [word for word in inside if word.end - word.start <= longest / 2]


def test_windows_end_at_the_limit_or_in_the_last_pause_before_it() -> None:
    assert windows(12.0, 5.0) == [(0.0, 5.0), (5.0, 10.0), (10.0, 12.0)]
    words = [Timed(1.0, 2.0, "a"), Timed(3.0, 4.6, "b"), Timed(4.8, 5.4, "c"), Timed(9.0, 9.9, "d")]
    found = windows(12.0, 5.0, words)
    assert [segment.start for segment in found] == pytest.approx([0.0, 4.7, 7.2])
    assert [segment.end for segment in found] == pytest.approx([4.7, 7.2, 12.0])


def test_words_that_touch_have_a_pause_between_them_whatever_their_rounding() -> None:
    words = [Timed(0.0, 0.1 + 0.2, "a"), Timed(0.3, 0.9, "b")]
    assert [segment.end for segment in windows(0.9, 0.7, words)] == [0.3, 0.9]


def test_a_window_may_end_in_a_pause_in_which_the_one_before_ended() -> None:
    words = [Timed(0.0, 1.5, "a"), Timed(5.5, 6.0, "b")]
    assert [segment.end for segment in windows(6.0, 1.875, words)] == [1.875, 3.75, 4.625, 6.0]


def test_a_phrase_that_is_too_long_is_cut_and_the_pause_before_it_at_most_twice() -> None:
    words = [Timed(1.0, 6.0, "a phrase")]
    assert [segment.end for segment in windows(6.5, 2.0, words)] == [0.5, 1.0, 3.0, 5.0, 6.5]


def test_no_window_is_much_shorter_than_a_word() -> None:
    words = [Timed(0.0, 1.0, "a"), Timed(1.012, 9.0, "a long phrase")]
    ends = [segment.end for segment in windows(9.0, 1.003, words)]
    assert all(after - before >= LEAST for before, after in pairwise([0.0, *ends]))


@given(
    units=st.lists(st.tuples(times, st.sampled_from([0.0, 0.5, 3.0, 20.0])), max_size=12),
    duration=st.floats(0.1, 60),
    longest=st.sampled_from([0.5, 1.875, 2.0, 7.0]),
)
def test_windows_are_few_with_any_words(units: list[tuple[float, float]], duration: float, longest: float) -> None:
    words = sorted(Timed(start, start + length, "x") for start, length in units)  # they may overlap
    segments = windows(duration, longest, words)
    assert all(one.end == other.start for one, other in pairwise(segments))
    assert len(segments) <= duration / longest + 3 * len(words) + 1


@given(speech=parts(50.0), longest=st.floats(4.0, 40.0), rest=st.floats(0, 10))
def test_segments_of_speech_keep_all_of_it_within_the_limits(
    speech: list[tuple[float, float]], longest: float, rest: float
) -> None:
    duration = (speech[-1][1] if speech else 0.0) + rest
    segments = segments_of_speech([Segment(*part) for part in speech], duration, longest)
    assert all(segment.start >= -1e-9 and segment.end <= duration + 1e-9 for segment in segments)
    shortest = min(SHORTEST, duration)
    assert all(shortest - 1e-6 <= segment.end - segment.start <= longest + 1e-6 for segment in segments)
    assert all(one.end <= other.start + 1e-9 for one, other in pairwise(segments))
    for start, end in speech:
        kept = sum(max(min(end, segment.end) - max(start, segment.start), 0.0) for segment in segments)
        assert kept == pytest.approx(end - start, abs=1e-6)


@given(speech=parts(20.0))
def test_long_pauses_are_left_out(speech: list[tuple[float, float]]) -> None:
    speech = [(start, end) for start, end in speech if end - start >= SHORTEST]
    segments = segments_of_speech([Segment(*part) for part in speech], 1000.0, 30.0)
    pauses = sum(max(other[0] - one[1], 0) for one, other in pairwise(speech))
    kept = sum(segment.end - segment.start for segment in segments) - sum(end - start for start, end in speech)
    assert kept <= LONGEST_PAUSE * len(speech) + 1e-6 and kept <= pauses + 1e-6


def test_speech_is_cut_in_its_last_pause_before_the_limit() -> None:
    speech = [Segment(1.0, 6.0), Segment(6.3, 9.0), Segment(9.2, 14.0), Segment(20.0, 20.5)]
    assert segments_of_speech(speech, 30.0, 10.0) == [
        (1.0, pytest.approx(9.1)),
        (pytest.approx(9.1), 14.0),
        (19.25, 21.25),
    ]


@given(units=parts(3.0), cuts=st.lists(times, max_size=8))
def test_every_word_is_in_exactly_one_of_adjacent_segments(units: list[tuple[float, float]], cuts: list[float]) -> None:
    words = [Timed(*part, str(number)) for number, part in enumerate(units)]
    borders = sorted({0.0, *cuts, 1000.0})
    segments = [Segment(*pair) for pair in pairwise(borders)]
    found = [word for segment in segments for word in words_of(segment, words)[0]]
    assert found == words


@given(
    units=st.lists(st.tuples(times, st.sampled_from([0.0, 0.3, 2.0, 40.0])), max_size=20), ends=st.tuples(times, times)
)
def test_the_words_near_to_a_segment_are_all_that_it_has(
    units: list[tuple[float, float]], ends: tuple[float, float]
) -> None:
    words = sorted(Timed(start, start + length, "x") for start, length in units)  # they may overlap
    segment = Segment(min(ends), max(ends))
    near = near_to(words)(segment)
    assert words_of(segment, near) == words_of(segment, words)
    assert {word for word in words if word.start < segment.end and word.end > segment.start} <= {*near}


def test_a_recording_of_ten_hours() -> None:
    words = [Timed(0.36 * number, 0.36 * number + 0.3, str(number)) for number in range(100_000)]
    near = near_to(words)
    segments = windows(36_000.0, 15.0, words)
    assert max(len(near(segment)) for segment in segments) < 50
    assert [word for segment in segments for word in words_of(segment, near(segment))[0]] == words
    assert not any(words_of(segment, near(segment))[1] for segment in segments)


def test_one_long_phrase_does_not_slow_down_the_search() -> None:
    words = [Timed(0.36 * number, 0.36 * number + 0.3, str(number)) for number in range(100_000)]
    near = near_to([Timed(0.0, 36_000.0, "music"), *words])
    assert max(len(near(Segment(start, start + 15.0))) for start in range(0, 36_000, 15)) < 50


def test_a_word_that_is_cut_is_partly_in_both_segments() -> None:
    words = [Timed(0.0, 1.0, "a"), Timed(1.5, 3.5, "b"), Timed(3.9, 4.1, "c")]
    assert words_of(Segment(0.0, 2.0), words) == ([words[0]], [words[1]])
    assert words_of(Segment(2.0, 4.0), words) == ([words[1]], [words[1]])
    assert words_of(Segment(4.0, 5.0), words) == ([words[2]], [])
