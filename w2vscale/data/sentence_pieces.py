"""The SentencePiece model that `ctc.sentencepiece` names."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from w2vscale.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def open_pieces(path: Path) -> SentencePieceProcessor:
    """Load the model.

    Raises:
        UserError: sentencepiece is not installed; the file cannot be read, is no SentencePiece model, or is one whose
            pieces are not all text.
    """
    pieces = sentencepiece().SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except OSError as error:
        raise UserError(f"ctc.sentencepiece={path}: cannot be read: {error.strerror}") from None
    except RuntimeError:
        raise UserError(f"ctc.sentencepiece={path}: not a SentencePiece model") from None
    if any(map(pieces.is_byte, range(len(pieces)))):
        raise UserError(f"ctc.sentencepiece={path}: has pieces for bytes; train it without byte_fallback")
    return pieces


def vocabulary_of(pieces: SentencePieceProcessor) -> list[str]:
    """The blank, then all pieces: id i of the model is label i + 1."""
    return ["<pad>", *map(pieces.id_to_piece, range(len(pieces)))]


def sentencepiece() -> ModuleType:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed: pip install 'w2vscale[decode]'") from None
    return sentencepiece
