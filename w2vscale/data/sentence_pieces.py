"""Load the SentencePiece model that `objective.sentencepiece` names."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from w2vscale.errors import UserError
from w2vscale.files import nearest_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def open_pieces(path: Path) -> SentencePieceProcessor:
    """Load the model at `path`. Raises UserError if it cannot be used or sentencepiece is not installed."""
    pieces = sentencepiece().SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"objective.sentencepiece={path}: cannot be read: {reason}{nearest_path(path)}") from None
    except RuntimeError:
        raise UserError(f"objective.sentencepiece={path}: not a SentencePiece model") from None
    if any(map(pieces.is_byte, range(len(pieces)))):
        raise UserError(f"objective.sentencepiece={path}: has pieces for bytes; train it without byte_fallback")
    return pieces


def vocabulary_of(pieces: SentencePieceProcessor) -> list[str]:
    """Return the vocabulary: the blank, then all pieces. Piece i of the model is label i + 1."""
    return ["<pad>", *map(pieces.id_to_piece, range(len(pieces)))]


def sentencepiece() -> ModuleType:
    """Import the sentencepiece package. Raises UserError if it is not installed."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed: pip install 'w2vscale[decode]'") from None
    return sentencepiece
