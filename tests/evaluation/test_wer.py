"""Error rates agree with alignments done by hand; intervals."""

from __future__ import annotations

import pytest

from w2vscale.evaluation.wer import EditCounts, score, summarise


def test_words_and_characters_of_alignments_by_hand() -> None:
    # a b c d e f -
    # a x c - e f g
    found = score("u", "a b c d e f", "a x c e f g")
    assert found.words == EditCounts(reference=6, substitutions=1, deletions=1, insertions=1)
    assert found.words.rate == pytest.approx(0.5)
    # substitute k with s and e with i, insert g
    assert score("u", "kitten", "sitting").characters == EditCounts(6, 2, 0, 1)


def test_an_empty_hypothesis_is_all_deletions() -> None:
    assert score("u", "a b c", "").words == EditCounts(3, 0, 3, 0)


def test_rates_are_computed_over_all_words() -> None:
    scored = [
        score("a", "one", "two", speaker="ann"),
        score("b", "one two three four five six seven eight nine", "one two three four five six seven eight nine"),
        score("c", "one two", "one two", speaker="ann"),
    ]
    found = summarise(scored, [])
    assert found.words == EditCounts(12, 1, 0, 0)
    assert {speaker: errors.rate for speaker, errors in found.speakers.items()} == {"ann": 1 / 3, "unknown": 0.0}
    assert [one.utterance for one in found.worst(5)] == ["a"]


def test_intervals_hold_the_rate_and_shrink_with_more_utterances() -> None:
    def found(repeats: int) -> tuple[float, float, float]:
        scored = [
            score(f"{n}", "one two three four", ["one two three four", "one", "two two"][n % 3]) for n in range(repeats)
        ]
        of_all = summarise(scored, [])
        return of_all.word_interval[0], of_all.words.rate, of_all.word_interval[1]

    few, many = found(12), found(300)
    assert few[0] < few[1] < few[2] and many[0] < many[1] < many[2]
    assert many[2] - many[0] < 0.4 * (few[2] - few[0])
    # A third of the utterances has no errors, two thirds have three of four words wrong; ±1.96 standard errors.
    variance = (0.5**2 + 0.25**2 + 0.25**2) / 3
    assert many[2] - many[0] == pytest.approx(2 * 1.96 * (variance / 300) ** 0.5, rel=0.15)
