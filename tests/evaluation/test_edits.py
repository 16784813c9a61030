"""Words side by side, with the fewest edits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from w2vscale.evaluation.edits import aligned_words, alignment_lines
from w2vscale.evaluation.wer import EditCounts, score

TEXTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join)


def test_an_alignment_by_hand() -> None:
    assert aligned_words("a b c d e f", "a x c e f g") == [
        ("a", "a"), ("b", "x"), ("c", "c"), ("d", ""), ("e", "e"), ("f", "f"), ("", "g"),
    ]  # fmt: skip
    assert aligned_words("a b", "") == [("a", ""), ("b", "")]
    assert aligned_words("", "") == []


@given(TEXTS, TEXTS)
def test_it_has_the_edits_that_jiwer_counts(reference: str, hypothesis: str) -> None:
    pairs = aligned_words(reference, hypothesis)
    assert " ".join(word for word, _ in pairs if word) == reference
    assert " ".join(guess for _, guess in pairs if guess) == hypothesis
    found = EditCounts(
        reference=len(reference.split()),
        substitutions=sum(bool(word and guess) and word != guess for word, guess in pairs),
        deletions=sum(not guess for _, guess in pairs),
        insertions=sum(not word for word, _ in pairs),
    )
    assert found == score("u", reference, hypothesis).words


def test_alignments_wrap_at_the_width_of_the_terminal() -> None:
    assert alignment_lines("the cat sat down", "the bat sat down now", width=30) == [
        "reference   the cat sat down",
        "hypothesis  the bat sat down",
        "edits           S",
        "reference   ***",
        "hypothesis  now",
        "edits       I",
    ]
    assert alignment_lines("a long reference", "a", width=80) == [
        "reference   a long reference",
        "hypothesis  a **** *********",
        "edits         D    D",
    ]
    # A character of Chinese takes two cells.
    assert alignment_lines("你好 b", "你 b", width=80) == ["reference   你好 b", "hypothesis  你   b", "edits       S"]
    assert max(map(len, alignment_lines("word " * 40, "ward " * 38, width=40))) <= 40
