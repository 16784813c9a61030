"""The words of a reference and a hypothesis, side by side."""

from __future__ import annotations

from itertools import zip_longest

from rapidfuzz.distance import Levenshtein


def aligned_words(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Pair the words of two texts with the fewest edits, as jiwer does.

    A deleted word has "" as its hypothesis, an inserted word "" as its reference.
    """
    words, guesses = reference.split(), hypothesis.split()
    pairs: list[tuple[str, str]] = []
    for edit in Levenshtein.opcodes(words, guesses):
        here, there = words[edit.src_start : edit.src_end], guesses[edit.dest_start : edit.dest_end]
        # Only insertions and deletions have a side without words.
        pairs += zip_longest(here, there, fillvalue="")
    return pairs
