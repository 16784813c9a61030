"""Load the SentencePiece model that `objective.sentencepiece` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from w2vscale.errors import UserError
from w2vscale.files import nearest_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

BLANK_SYMBOL = "<pad>"
"""The blank of CTC, unless a piece of the model is the blank."""


def open_pieces(path: Path, *, named: str = "objective.sentencepiece") -> SentencePieceProcessor:
    """Load the model at `path`, which the setting or option `named` gives.

    Raises UserError if it cannot be used or sentencepiece is not installed.
    """
    pieces = sentencepiece().SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{named}={path}: cannot be read: {reason}{nearest_path(path)}") from None
    except RuntimeError:
        raise UserError(f"{named}={path}: not a SentencePiece model") from None
    if any(map(pieces.is_byte, range(len(pieces)))):
        raise UserError(f"{named}={path}: has pieces for bytes; train it without byte_fallback")
    return pieces


def vocabulary_of(pieces: SentencePieceProcessor) -> list[str]:
    """Return the vocabulary: the blank of CTC, then all pieces.

    If piece 0 is a control symbol, which no text contains, it is the blank, as in fairseq2.
    """
    found = _all(pieces)
    return found if pieces.is_control(0) else [BLANK_SYMBOL, *found]


def label_of_first(pieces: SentencePieceProcessor, vocabulary: Sequence[str]) -> int | None:
    """Return the label of piece 0, which those of the other pieces follow; None if the vocabulary is another one."""
    found = _all(pieces)
    if list(vocabulary) == [BLANK_SYMBOL, *found]:
        return 1
    return 0 if list(vocabulary) == found and pieces.is_control(0) else None


def _all(pieces: SentencePieceProcessor) -> list[str]:
    return list(map(pieces.id_to_piece, range(len(pieces))))


def sentencepiece() -> ModuleType:
    """Import the sentencepiece package. Raises UserError if it is not installed."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed: pip install 'w2vscale[decode]'") from None
    return sentencepiece
