"""Convert transcripts to labels of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lhotse.cut import Cut

from w2vscale.data.audio import AudioError
from w2vscale.data.sentence_pieces import open_pieces, vocabulary_of
from w2vscale.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

BLANK = 0  # label of the CTC blank: the first symbol of every vocabulary
SPACE = "|"  # symbol for a space in character vocabularies
PIECE_SPACE = "▁"  # symbol for a space in SentencePiece vocabularies
UNKNOWN = "<unk>"


class Transcripts:
    """Converts transcripts to labels: characters, with `|` for a space, or sentence pieces.

    If all letters of the vocabulary have the same case, transcripts are converted to it. Sentence pieces need the
    SentencePiece model; for case conversion alone (`normalised`), the vocabulary is enough.

    Raises UserError if sentencepiece is not installed, or the model cannot be read or does not fit the vocabulary.
    """

    def __init__(self, vocabulary: Sequence[str], sentencepiece: Path | None = None) -> None:
        self._pieces = None
        if sentencepiece is not None:
            self._pieces = open_pieces(sentencepiece)
            if (wanted := vocabulary_of(self._pieces)) != list(vocabulary):
                raise UserError(
                    f"objective.sentencepiece={sentencepiece}: its {len(wanted) - 1} pieces after a blank are not the "
                    f"{len(vocabulary)} symbols of objective.vocabulary; for a new run set objective.vocabulary=[]"
                )
        # The blank is never a label, even if a transcript contains a character that equals its symbol.
        self._numbers = {symbol: number for number, symbol in enumerate(vocabulary) if number != BLANK}
        # Only characters and pieces that begin a word determine the case: special symbols such as <unk> must not.
        letters = "".join(symbol for symbol in vocabulary if len(symbol) == 1 or PIECE_SPACE in symbol)
        self._upper, self._lower = letters == letters.upper(), letters == letters.lower()

    def normalised(self, text: str) -> str:
        """Convert `text` to the case of the vocabulary, and runs of whitespace to single spaces."""
        text = " ".join(text.split())
        return text.upper() if self._upper else text.lower() if self._lower else text

    def labels(self, text: str) -> tuple[list[int], str]:
        """Return the labels of `text`, and the characters that are not in the vocabulary and became `<unk>`.

        With sentence pieces, adjacent unknown characters share one `<unk>`. Raises AudioError if the text is empty, or
        has unknown characters and the vocabulary has no `<unk>`.
        """
        text = self.normalised(text)
        if not text:
            raise AudioError("no transcript", "has no transcript")
        if self._pieces is not None:
            return _piece_labels(text, self._pieces)
        spelled = text.replace(" ", SPACE)
        unknown = "".join(sorted({character for character in spelled if character not in self._numbers}))
        if unknown and UNKNOWN not in self._numbers:
            raise AudioError("unknown symbols", f"its transcript has {unknown!r}, which is not in objective.vocabulary")
        return [self._numbers.get(character, self._numbers.get(UNKNOWN, BLANK)) for character in spelled], unknown


def _piece_labels(text: str, pieces: SentencePieceProcessor) -> tuple[list[int], str]:
    numbers = pieces.encode(text)
    unknown = {
        character
        for number, piece in zip(numbers, pieces.encode(text, out_type=str), strict=True)
        if number == pieces.unk_id()
        for character in piece
    }
    return [BLANK + 1 + number for number in numbers], "".join(sorted(unknown))


def labels_to_text(labels: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Join the symbols of labels to a text, with spaces for `|` and `▁` and without blanks.

    As in the tokenizer of Transformers, other special symbols such as `<s>` and `<unk>` stay as they are.
    """
    joined = "".join(vocabulary[label] for label in labels if label != BLANK)
    return " ".join(joined.replace(SPACE, " ").replace(PIECE_SPACE, " ").split())


def transcript(cut: Cut) -> str:
    """Return the transcript of an utterance; empty if it has none."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


def refuse_too_many(labels: Sequence[int], frames: int) -> None:
    """Raise AudioError if an utterance has too few frames for its labels and a blank between equal adjacent labels."""
    needed = len(labels) + sum(one == other for one, other in pairwise(labels))
    if needed > frames:
        raise AudioError("too short", f"its {frames} frames are too few for the {len(labels)} labels of its transcript")
