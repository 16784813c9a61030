"""The words of a reference and a hypothesis, side by side."""

from __future__ import annotations

from itertools import zip_longest

from rapidfuzz.distance import Levenshtein
from rich.cells import cell_len, set_cell_size

ROWS = ("reference", "hypothesis", "edits")


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


def alignment_lines(reference: str, hypothesis: str, *, width: int) -> list[str]:
    """Show two texts one above the other in lines of at most `width` cells, with the edits below: S, D and I.

    A block of lines that is full is followed by another. A word that is wider than a line stays whole.
    """
    label = max(map(len, ROWS)) + 2
    lines: list[str] = []
    block = ["", "", ""]
    for one, other in aligned_words(reference, hypothesis):
        edit = "D" if not other else "I" if not one else "S" if one != other else ""
        column = max(cell_len(one), cell_len(other), 1)
        if block[0] and label + cell_len(block[0]) + column > width:
            lines += _labelled(block, label)
            block = ["", "", ""]
        words = (one or "*" * column, other or "*" * column, edit)
        block = [text + set_cell_size(word, column) + " " for text, word in zip(block, words, strict=True)]
    return lines + _labelled(block, label)


def _labelled(block: list[str], label: int) -> list[str]:
    """Put the name of each row before it; a row without edits is left out."""
    return [f"{name:{label}}{text}".rstrip() for name, text in zip(ROWS, block, strict=True) if text.strip()]
