"""Convert transcripts to labels of a vocabulary, and labels to text. Both texts are in the Unicode normal form NFC."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from w2vscale.data.decoding import AudioError
from w2vscale.data.letter_case import LetterCase
from w2vscale.data.sentence_pieces import label_of_first, open_pieces
from w2vscale.data.vocabulary import (
    BLANK,
    MARKS,
    PIECE_SPACE,
    SPACE,
    is_bracketed,
    is_control,
    is_spaced,
    unknown_symbol,
)
from w2vscale.errors import UserError

if TYPE_CHECKING:
    from lhotse.cut import Cut
    from sentencepiece import SentencePieceProcessor

OVERHANG = 0.1  # seconds by which a supervision may exceed its utterance: times are rounded


class Transcripts:
    """Converts transcripts to labels: characters, symbols of several characters, or sentence pieces.

    The longest symbol that matches is chosen, and `|` is the label of a space. If the text is `spaced` (default: see
    `is_spaced`), its symbols have spaces between them, as phones do. Letters of the other case than the vocabulary's
    are converted (`LetterCase`). Special symbols such as `<unk>` are never found in a text, and neither is the blank.

    Sentence pieces need the SentencePiece model; for case conversion alone (`normalised`), the vocabulary is enough.
    Raises UserError if sentencepiece is not installed, or the model cannot be read or does not fit the vocabulary.
    """

    def __init__(
        self, vocabulary: Sequence[str], sentencepiece: Path | None = None, *, spaced: bool | None = None
    ) -> None:
        self._pieces = None
        if sentencepiece is not None:
            self._pieces = open_pieces(sentencepiece)
            first = label_of_first(self._pieces, vocabulary)
            if first is None:
                raise UserError(
                    f"objective.sentencepiece={sentencepiece}: its {len(self._pieces)} pieces after a blank are not "
                    f"the {len(vocabulary)} symbols of objective.vocabulary; for a new run set objective.vocabulary=[]"
                )
            self._first = first
        composed = list(vocabulary)
        if self._pieces is None:
            composed = [unicodedata.normalize("NFC", symbol) for symbol in vocabulary]
        self.unknown = unknown_symbol(composed)  # the symbol for what is not in the vocabulary; None without one
        if self._pieces is not None:
            self.unknown = str(self._pieces.id_to_piece(self._pieces.unk_id()))
        self.unknown_label = composed.index(self.unknown) if self.unknown is not None else BLANK
        self._spaced = is_spaced(composed, sentencepiece=sentencepiece) if spaced is None else spaced
        # The blank is never a label, even if a transcript contains a character that equals its symbol.
        symbols = {
            symbol: number for number, symbol in enumerate(composed) if number != BLANK and not is_control(symbol)
        }
        # Names in brackets are found as they are. Their letters say nothing about the case of the others.
        self._case = LetterCase({*"".join(symbol for symbol in symbols if not is_bracketed(symbol))} | {" "})
        names = "|".join(re.escape(symbol) for symbol in symbols if is_bracketed(symbol) and not self._spaced)
        self._names = re.compile(f"({names})") if names else None
        if self._spaced:
            # Where two symbols differ in case alone, as in SAMPA, another case is another symbol.
            self._one_case = len({symbol.casefold() for symbol in symbols}) == len(symbols)
            self._numbers = symbols
            return
        # A `|` in a transcript is not a space, nor is `▁`.
        space = symbols.get(SPACE, symbols.get(PIECE_SPACE))
        self._numbers = {
            symbol: number for symbol, number in symbols.items() if symbol != SPACE and PIECE_SPACE not in symbol
        }
        if space is not None:
            self._numbers[" "] = space
        self._long = any(len(symbol) > 1 for symbol in self._numbers)

    def normalised(self, text: str) -> str:
        """Convert `text` to NFC and to the case of the vocabulary, and runs of whitespace to single spaces."""
        return unicodedata.normalize("NFC", self._converted(text))

    def labels(self, text: str) -> tuple[list[int], str]:
        """Return the labels of `text`, and what of it is not in the vocabulary and became its unknown symbol.

        With sentence pieces, adjacent unknown characters share one label. Raises AudioError if the text is empty, or
        has unknown characters and the vocabulary has no symbol for them.
        """
        labels, found = self.encode(text)
        distinct = sorted(set(found))
        unknown = ("" if all(len(symbol) == 1 for symbol in distinct) else " ").join(distinct)
        if not labels:
            raise AudioError("no transcript", "has no transcript")
        if unknown and self.unknown is None:
            raise AudioError("unknown symbols", f"its transcript has {unknown!r}, which is not in objective.vocabulary")
        return labels, unknown

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Return the labels of `text`, and what of it is unknown, in the order and as often as it occurs.

        The label of what is unknown is that of the unknown symbol, or `BLANK` if there is none.
        """
        text = self._converted(text)
        if self._pieces is not None:
            return _piece_labels(text, self._pieces, self._first)
        numbers = self._numbers
        symbols = text.split() if self._spaced else self._symbol.findall(text) if self._long else text
        try:
            return [numbers[symbol] for symbol in symbols], []
        except KeyError:
            # A letter with an unknown mark is an unknown letter.
            symbols = symbols if self._spaced else self._symbol.findall(text)
        unknown = [symbol for symbol in symbols if symbol not in numbers]
        return [numbers.get(symbol, self.unknown_label) for symbol in symbols], unknown

    def _converted(self, text: str) -> str:
        """Convert to the case of the vocabulary. What it has only as a base and marks is decomposed."""
        text = " ".join(unicodedata.normalize("NFC", text).split())
        if self._spaced:
            return " ".join(map(self._phone, text.split()))
        if self._names is None:
            return self._case(text)
        parts = self._names.split(text)  # names have odd places
        return "".join(part if place % 2 else self._case(part) for place, part in enumerate(parts))

    def _phone(self, token: str) -> str:
        if token in self._numbers or not self._one_case:
            return token
        converted = self._case(token)
        return converted if converted in self._numbers else token

    @cached_property
    def _symbol(self) -> re.Pattern[str]:
        """The longest symbol, or a character that is in none. Marks that are unknown belong to the character before."""
        single = "".join(re.escape(symbol) for symbol in self._numbers if len(symbol) == 1)
        longer = sorted((symbol for symbol in self._numbers if len(symbol) > 1), key=len, reverse=True)
        known = "|".join([*map(re.escape, longer), *([f"[{single}]"] if single else [])]) or r"(?!)"
        marks = f"(?:(?![{single}])[{MARKS}])" if single else f"[{MARKS}]"
        return re.compile(f"(?:{known})(?!{marks})|.{marks}*", re.DOTALL)


def _piece_labels(text: str, pieces: SentencePieceProcessor, first: int) -> tuple[list[int], list[str]]:
    """`first`: label of piece 0."""
    numbers = pieces.encode(text)
    unknown = [
        character
        for number, piece in zip(numbers, pieces.encode(text, out_type=str), strict=True)
        if number == pieces.unk_id()
        for character in piece
    ]
    return [first + number for number in numbers], unknown


def labels_to_text(labels: Sequence[int], vocabulary: Sequence[str], *, spaced: bool = False) -> str:
    """Join the symbols of labels to a text without blanks, in NFC: with spaces for `|` and `▁`.

    If `spaced`, there is a space between all symbols instead. As in the tokenizer of Transformers, other special
    symbols such as `<s>` and `<unk>` stay as they are.
    """
    symbols = [vocabulary[label] for label in labels if label != BLANK]
    if not spaced:
        joined = "".join(" " if symbol == SPACE else symbol for symbol in symbols)
        symbols = joined.replace(PIECE_SPACE, " ").split()
    return unicodedata.normalize("NFC", " ".join(symbols))


def transcript(cut: Cut) -> str:
    """Return the transcript of an utterance, in the order of time; empty if it has none."""
    parts = sorted(cut.supervisions, key=lambda part: part.start)
    return " ".join(part.text or "" for part in parts)


def refuse_overhang(cut: Cut) -> None:
    """Raise AudioError if the transcript begins before the utterance or ends after it: not all of it is in the audio.

    Lhotse's `cut_into_windows` makes such cuts.
    """
    for part in cut.supervisions:
        if (part.text or "").strip() and (part.start < -OVERHANG or part.end > cut.duration + OVERHANG):
            raise AudioError(
                "overhanging text",
                f"has text from {part.start:.2f} to {part.end:.2f} s, but lasts from 0 to {cut.duration:.2f} s",
            )


def refuse_too_many(labels: Sequence[int], frames: int) -> None:
    """Raise AudioError if an utterance has too few frames for its labels and a blank between equal adjacent labels."""
    needed = len(labels) + sum(one == other for one, other in pairwise(labels))
    if needed > frames:
        raise AudioError("too short", f"its {frames} frames are too few for the {len(labels)} labels of its transcript")
