"""The symbols of an output layer for text: read them from files of several formats, and check them.

Symbols are in the Unicode normal form NFC, except sentence pieces, which are those of their model.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2vscale.data.sentence_pieces import open_pieces, vocabulary_of
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_text

BLANK = 0  # label of the CTC blank: the first symbol of every vocabulary
SPACE = "|"  # symbol for a space in character vocabularies
PIECE_SPACE = "▁"  # symbol for a space in SentencePiece vocabularies
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [*SPECIAL, SPACE, *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
"""Vocabulary of the published English models, in the same order; `|` is the space."""

MARKS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
"""The combining marks that are not of one script, as ranges in a regular expression. A letter and its marks are one
letter. Vowel signs of Devanagari, Thai and others are not among them: they are usually symbols of their own."""

_GRAPHEME = re.compile(f".[{MARKS}]*", re.DOTALL)
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_CONTROL = re.compile(r"[<\[](pad|unk|unknown|/?s|bos|eos|sos|sos/eos|(ctc_)?blank|blk|eps|mask|cls|sep)[>\]]", re.I)
_UNKNOWN = ("<unk>", "[UNK]", "<UNK>", "[unk]")
_PADDING = ("[PAD]", "<pad>", "<PAD>", "[pad]")
NUMBER = re.compile(r"[0-9]{1,18}")
_OVERWRITE = "#fairseq:overwrite"


def read_vocabulary(
    named: Sequence[str] | Path,
    *,
    sentencepiece: Path | None = None,
    split: str = "auto",
    setting: str = "objective.vocabulary",
) -> list[str]:
    """Return the symbols that a setting or option (`setting`) names, blank first: a list, `letters`, or a file.

    A file is a list with one symbol per line, a dictionary of fairseq (`dict.ltr.txt`), symbols with their numbers
    (`tokens.txt`), or a `vocab.json` of Transformers. If nothing is named, the symbols are those of `sentencepiece`;
    see `vocabulary_of`. A file is checked with `check_vocabulary`. A list is not: it may belong to a checkpoint.

    Raises UserError if there are no symbols, only one, or one twice, or a file cannot be read or used.
    """
    source = setting
    if not isinstance(named, Path):
        symbols = list(named)
    elif str(named) == "letters":
        return [*LETTERS]
    else:
        source, symbols = f"{setting}={named}", _symbols_in(named, setting)
    if not symbols and sentencepiece is not None:
        symbols = vocabulary_of(open_pieces(sentencepiece))
    if not symbols:
        raise UserError(f"{source} is empty; use a fine-tuning preset such as ctc_1h")
    if len(symbols) == 1:
        raise UserError(f"{source.partition('=')[0]}={symbols}: has a blank and no other symbol")
    _refuse_repeated(symbols, source)
    if sentencepiece is None:
        composed = [SPACE if symbol == " " else unicodedata.normalize("NFC", symbol) for symbol in symbols]
        # A checkpoint of an earlier version may have two forms of a letter.
        symbols = composed if isinstance(named, Path) or len({*composed}) == len(symbols) else symbols
    if isinstance(named, Path):
        check_vocabulary(symbols, source=source, sentencepiece=sentencepiece, split=split)
    return symbols


def _refuse_repeated(symbols: Sequence[str], source: str) -> None:
    seen: set[str] = set()
    for symbol in symbols:
        if symbol in seen:
            raise UserError(f"{source}: {show_symbol(symbol)} is in it twice (letters are compared in the form NFC)")
        seen.add(symbol)


def check_vocabulary(
    symbols: Sequence[str], *, source: str = "objective.vocabulary", sentencepiece: Path | None = None, split: str
) -> None:
    """Check that a new model can be trained with these symbols; `source` names them in errors.

    Raises UserError if the blank is a symbol of text, a symbol is in it twice or contains white space, or there is no
    space to separate words with, which only symbols that transcripts separate with spaces (`split`) do without. The
    pieces of a SentencePiece model may be any text.
    """
    if sentencepiece is None:
        _refuse_repeated([unicodedata.normalize("NFC", symbol) for symbol in symbols], source)
    blank = symbols[BLANK]
    is_text = any(one in (SPACE, PIECE_SPACE) or unicodedata.category(one)[0] in "LMN" for one in blank)
    if not blank or (is_text and not is_bracketed(blank)):
        raise UserError(
            f"{source}: its first symbol {show_symbol(blank)} would be the blank of CTC, which is never in a text; put "
            "<pad> before it"
        )
    for symbol in symbols if sentencepiece is None else ():
        if symbol.split() != [symbol] or any(unicodedata.category(character) == "Cs" for character in symbol):
            raise UserError(
                f"{source}: the symbol {symbol!r} is empty, or has white space or half of a surrogate pair; write a "
                f"space as {SPACE}"
            )
    spaced = is_spaced(symbols, sentencepiece=sentencepiece, split=split)
    if spaced and split == "auto" and SPACE in symbols:
        unspelled = next(symbol for symbol in symbols[BLANK + 1 :] if is_spaced([blank, symbol, *_letters(symbols)]))
        raise UserError(
            f"{source}: has {SPACE} for the space between words, but {show_symbol(unspelled)} cannot be spelled with "
            "its letters, as in phones; set objective.split=longest, or spaces if transcripts are symbols with spaces "
            "between them"
        )
    if spaced and sentencepiece is not None:
        raise UserError(
            f"objective.split={split}: objective.sentencepiece splits the transcripts; set objective.split=auto"
        )
    if not spaced and SPACE not in symbols and not any(PIECE_SPACE in symbol for symbol in symbols):
        raise UserError(
            f"{source}: has no symbol for the space between words; add {SPACE} (in a file, a line with it), or set "
            "objective.split=spaces if transcripts are symbols with spaces between them, such as phones"
        )


def is_spaced(symbols: Sequence[str], *, sentencepiece: Path | None = None, split: str = "auto") -> bool:
    """Whether transcripts have spaces between these symbols, e.g. phones, rather than between words.

    With `split` `auto`, they have if one of several letters cannot be spelled with the others, as `sil` without `s`.
    """
    if split != "auto":
        return split == "spaces"
    if sentencepiece is not None or any(PIECE_SPACE in symbol for symbol in symbols):
        return False
    letters = {*_letters(symbols)}
    words = [symbol for symbol in symbols[BLANK + 1 :] if not is_bracketed(symbol) and symbol not in letters]
    return any(not {*graphemes(word)} <= letters and not {*word} <= letters for word in words)


def _letters(symbols: Sequence[str]) -> list[str]:
    return [symbol for symbol in symbols[BLANK + 1 :] if not is_bracketed(symbol) and _is_letter(symbol)]


def _is_letter(symbol: str) -> bool:
    return all(unicodedata.category(character)[0] == "M" for character in symbol[1:])


def graphemes(text: str) -> list[str]:
    """Split a text into characters; a letter and the combining marks after it are one."""
    return _GRAPHEME.findall(text)


def is_bracketed(symbol: str) -> bool:
    """Whether a symbol is a name in brackets, such as `<pad>` or `[noise]`, and not spelled as it is."""
    return _BRACKETED.fullmatch(symbol) is not None


def is_control(symbol: str) -> bool:
    """Whether a symbol is one that no transcript contains, such as `<pad>`, `<s>`, `[UNK]`."""
    return _CONTROL.fullmatch(symbol) is not None


def unknown_symbol(vocabulary: Sequence[str]) -> str | None:
    """The symbol for what is not in the vocabulary; None if it has none."""
    return next((symbol for symbol in _UNKNOWN if symbol in vocabulary[BLANK + 1 :]), None)


def show_symbol(symbol: str) -> str:
    """A symbol in quotes for a message, with its code points if it would not be visible by itself."""
    hidden = any(unicodedata.category(character)[0] in "CMZ" for character in symbol)
    return f"{symbol!r}" + f" ({' '.join(f'U+{ord(character):04X}' for character in symbol)})" * hidden


def _symbols_in(path: Path, setting: str) -> list[str]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{setting}={error}") from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{setting}={path}: must be `letters` or a readable file of symbols ({reason}){nearest_path(path)}"
        ) from None
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        return _symbols_of_json(text, f"{setting}={path}")
    return _symbols_of_lines(text, f"{setting}={path}")


def _symbols_of_lines(text: str, source: str) -> list[str]:
    """The symbols of a plain list, of a dictionary of fairseq, or of symbols with their numbers."""
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    fields = [line.removesuffix(_OVERWRITE).split() for _, line in lines if line.strip()]
    if fields and all(len(each) == 2 and NUMBER.fullmatch(each[1]) for each in fields):
        numbers = {int(number): symbol for symbol, number in fields}
        if sorted(numbers) == list(range(len(fields))):
            return [numbers[number] for number in range(len(fields))]
        if 0 in numbers or sorted(numbers) == list(range(1, len(fields) + 1)) != [1]:  # counts are neither
            raise UserError(
                f"{source}: the numbers of its {len(fields)} symbols are not 0 to {len(fields) - 1}, each once"
            )
        return _symbols_of_fairseq(lines, source)
    symbols = []
    for number, line in lines:
        if line == " ":
            symbols.append(SPACE)
        elif line and not line.strip():
            raise UserError(f"{source}: line {number} is white space: {line!r}; write a space as {SPACE}")
        elif len(words := line.split()) > 1:
            raise UserError(
                f"{source}: line {number} has {len(words)} words, {line.strip()!r}; write one symbol per line"
            )
        elif words:
            symbols.append(words[0])
    return symbols


def _symbols_of_fairseq(lines: Sequence[tuple[int, str]], source: str) -> list[str]:
    """The symbols of fairseq's dictionary, which lists symbols and counts, after the special ones it does not list."""
    symbols = [*SPECIAL]
    for number, line in lines:
        if not line.strip():
            continue
        symbol = line.split()[0]
        if symbol not in SPECIAL:
            symbols.append(symbol)
        elif not line.endswith(_OVERWRITE):
            raise UserError(
                f"{source}: line {number}: {symbol} in a file of symbols and numbers, which are neither 0, 1, 2, … nor "
                "the counts of a dictionary of fairseq, which does not list it; write one symbol per line"
            )
    return symbols


def _symbols_of_json(text: str, source: str) -> list[str]:
    """The symbols of a `vocab.json` by their numbers, except that the padding, its CTC blank, comes first."""
    try:
        pairs: Any = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f"{source}: must be an object of symbols and their numbers, as vocab.json of Transformers")
    for symbol, number in pairs:
        if type(number) is not int:
            raise UserError(
                f"{source}: {symbol!r} has no number but {str(number)[:40]!r}; for several languages, save one"
            )
    symbols = [symbol for _, symbol in sorted((number, symbol) for symbol, number in pairs)]
    if sorted(number for _, number in pairs) != list(range(len(pairs))):
        raise UserError(f"{source}: the numbers of its {len(pairs)} symbols are not 0 to {len(pairs) - 1}, each once")
    blanks = [symbol for symbol in _PADDING if symbol in symbols]
    if len(blanks) != 1:
        found = "both " + " and ".join(blanks) if blanks else "neither [PAD] nor <pad>"
        raise UserError(f"{source}: has {found}; the blank of CTC in Transformers is one of them")
    return [*blanks, *(symbol for symbol in symbols if symbol not in blanks)]
