"""The words of a path of CTC: which label is emitted in which frame."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from w2vscale.data.vocabulary import BLANK, PIECE_SPACE, SPACE


class Word(NamedTuple):
    """A word in the frames [first, end) that emit its symbols. CTC emits a symbol in few frames, often in one."""

    text: str  # in NFC
    first: int
    end: int
    score: float  # from 0 to 1: the geometric mean of the probabilities of its symbols in their frames


class _Emission(NamedTuple):
    """A symbol, or a character of it, and the frames [first, end) that emit the symbol."""

    text: str
    first: int
    end: int


def words_of(
    path_T: Sequence[int], log_probabilities_T: Sequence[float], vocabulary: Sequence[str], *, spaced: bool
) -> list[Word]:
    """Return the words of a path: of `labels_to_text`, which its spaces separate.

    If the text is `spaced` (phones), each symbol is a word. `log_probabilities_T` are those of the labels.
    """
    words = []
    for is_space, group in groupby(_emissions(path_T, vocabulary, spaced=spaced), key=lambda one: one.text.isspace()):
        if is_space:
            continue
        if spaced:
            words += [_word(one.text, _frames([one]), log_probabilities_T) for one in group]
        else:
            emissions = list(group)
            words.append(_word("".join(one.text for one in emissions), _frames(emissions), log_probabilities_T))
    return words


def given_words(
    path_T: Sequence[int], log_probabilities_T: Sequence[float], words_T: Sequence[str | None], *, space: int
) -> list[Word]:
    """Return words that a search has found: `words_T` has each in the frame in which it is complete."""
    words, start = [], 0
    for end, text in enumerate(words_T, start=1):
        if text is not None:
            letters = [frame for frame in range(start, end) if path_T[frame] not in (BLANK, space)]
            words.append(_word(text, letters, log_probabilities_T))
            start = end
    return words


def _emissions(path_T: Sequence[int], vocabulary: Sequence[str], *, spaced: bool) -> Iterator[_Emission]:
    """Yield what a path emits: symbols if `spaced`, or else characters."""
    end = 0
    for label, group in groupby(path_T):
        first, end = end, end + len(list(group))
        if label == BLANK:
            continue
        symbol = vocabulary[label]
        if spaced:
            yield _Emission(symbol, first, end)
        else:
            text = " " if symbol == SPACE else symbol.replace(PIECE_SPACE, " ")
            yield from (_Emission(character, first, end) for character in text)


def _frames(emissions: Sequence[_Emission]) -> list[int]:
    spans = dict.fromkeys((one.first, one.end) for one in emissions)
    return [frame for span in spans for frame in range(*span)]


def _word(text: str, frames: Sequence[int], log_probabilities_T: Sequence[float]) -> Word:
    score = math.exp(sum(log_probabilities_T[frame] for frame in frames) / len(frames))
    return Word(unicodedata.normalize("NFC", text), frames[0], frames[-1] + 1, min(score, 1.0))
