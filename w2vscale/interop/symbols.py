"""The symbols of the output layer of a model whose own file does not name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2vscale.data.sentence_pieces import open_pieces, vocabulary_of
from w2vscale.data.vocabulary import read_vocabulary
from w2vscale.errors import UserError

OPTION = "--tokenizer"
ADVICE = f"import the model with it: w2vscale import MODEL DIR {OPTION} FILE"


def tokenizer_of(model: Path, named: Path | None, pattern: str) -> Path | None:
    """The file with the symbols of a model: the one that is `named`, or the one beside it whose name has this pattern.

    None if there is none. Raises UserError if there are several.
    """
    if named is not None:
        return named
    found = sorted(path for path in model.parent.glob(pattern) if path.is_file())
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"several files beside it may have its symbols ({names}): keep one of them there, or {ADVICE}")
    return found[0] if found else None


def symbols_of(model: Path, named: Path | None, pattern: str, *, count: int) -> dict[str, Any]:
    """Read the symbols of a model from the file that `tokenizer_of` finds; see `symbols_in`. UserError without one."""
    tokenizer = tokenizer_of(model, named, pattern)
    if tokenizer is None:
        raise UserError(
            f"a CTC model needs the file with its {count} symbols: put it beside the model (as {pattern}), or {ADVICE}"
        )
    return symbols_in(tokenizer, count=count)


def symbols_in(tokenizer: Path, *, count: int) -> dict[str, Any]:
    """Read the symbols of an output layer of size `count`, the blank first, as settings of the objective `ctc`.

    They are the pieces of a SentencePiece model (`*.model`), or those of a file that `objective.vocabulary` takes.
    Raises UserError if they cannot be read, or their number is not `count`.
    """
    if tokenizer.suffix == ".model":
        settings: dict[str, Any] = {"sentencepiece": tokenizer.absolute()}
        vocabulary = vocabulary_of(open_pieces(tokenizer, named=OPTION))
    else:
        settings, vocabulary = {}, read_vocabulary(tokenizer, setting=OPTION)
    if len(vocabulary) != count:
        raise UserError(f"its output layer has {count} symbols, and {tokenizer} has {len(vocabulary)} with the blank")
    return {"vocabulary": vocabulary, **settings}
