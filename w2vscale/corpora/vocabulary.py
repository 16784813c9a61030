"""Count the symbols of transcripts, and write them as a vocabulary for `objective.vocabulary`."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from w2vscale.corpora.index import build_index
from w2vscale.corpora.parallel import Progress, chunked, no_progress, parallel_map
from w2vscale.data.letter_case import change_case
from w2vscale.data.manifest import Manifest
from w2vscale.data.transcripts import transcript
from w2vscale.data.vocabulary import PIECE_SPACE, SPACE, SPECIAL, graphemes, is_control
from w2vscale.errors import UserError
from w2vscale.files import write_text

CHUNK = 2000  # utterances that a process counts at a time
CASES = ("keep", "lower", "upper")


@dataclass
class SymbolCounts:
    """The symbols of transcripts, without spaces."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # the id of the first utterance with each symbol
    transcripts: int = 0
    untranscribed: int = 0  # utterances without a transcript
    turkish: bool = False  # whether letters were converted by the pairs of Turkish: I and ı, İ and i

    def add(self, other: SymbolCounts) -> None:
        """Add the counts of later utterances."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples
        self.transcripts += other.transcripts
        self.untranscribed += other.untranscribed

    def most_common(self) -> list[tuple[str, int]]:
        """Symbols and counts, most frequent first, then by code point."""
        return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))


def count_symbols(
    manifests: Sequence[Path], *, case: str = "keep", phones: bool = False, jobs: int = 1,
    progress: Progress = no_progress,
) -> SymbolCounts:  # fmt: skip
    """Count the symbols of all transcripts in NFC: a letter with its combining marks, or what is between spaces.

    `case` converts them letter by letter; if the transcripts contain ı or İ, the pairs of letters are those of Turkish.
    `phones`: symbols are what is between spaces. Raises UserError if a manifest cannot be used, or there are no
    transcripts.
    """
    if case not in CASES:
        raise UserError(f"--case {case}: choose one of {', '.join(CASES)}")
    for path in manifests:
        build_index(path)
    opened = [Manifest(path) for path in manifests]
    chunks = [(manifest, numbers) for manifest, of in enumerate(opened) for numbers in chunked(range(len(of)), CHUNK)]

    def count(chunk: tuple[int, Sequence[int]]) -> SymbolCounts:
        found, (manifest, numbers) = SymbolCounts(), chunk
        for cut in map(opened[manifest].cut, numbers):
            words = unicodedata.normalize("NFC", transcript(cut)).split()
            found.transcripts += bool(words)
            found.untranscribed += not words
            symbols = words if phones else [symbol for word in words for symbol in graphemes(word)]
            found.counts.update(symbols)
            for symbol in dict.fromkeys(symbols):
                found.examples.setdefault(symbol, cut.id)
        return found

    total, done = SymbolCounts(), 0
    for (_, numbers), found in zip(chunks, parallel_map(count, chunks, jobs=jobs, source=manifests[0]), strict=True):
        total.add(found)
        progress(done := done + len(numbers), sum(map(len, opened)))
    if not total.transcripts:
        raise UserError(f"{', '.join(map(str, manifests))}: no transcripts")
    return _in_case(total, case)


def _in_case(found: SymbolCounts, case: str) -> SymbolCounts:
    turkish = case != "keep" and any(letter in symbol for symbol in found.counts for letter in "ıİ")
    changed = SymbolCounts(transcripts=found.transcripts, untranscribed=found.untranscribed, turkish=turkish)
    for symbol, count in found.counts.items():
        new = unicodedata.normalize("NFC", change_case(symbol, case, turkish=turkish))
        changed.counts[new] += count
        changed.examples.setdefault(new, found.examples[symbol])
    return changed


def choose_symbols(found: SymbolCounts, *, min_count: int = 1, phones: bool = False) -> tuple[list[str], list[str]]:
    """The vocabulary, with the special symbols first, and the symbols that are not in it.

    It lacks symbols that occur less than `min_count` times, and those that mean something else in a vocabulary: `|` and
    `▁` between letters, and names such as `<unk>` between spaces.
    """
    kept: list[str] = []
    left_out: list[str] = []
    for symbol, count in found.most_common():
        reserved = is_control(symbol) if phones else symbol == SPACE or PIECE_SPACE in symbol
        reserved = reserved or "\0" in symbol  # a file with it is not text
        (left_out if reserved or count < min_count else kept).append(symbol)
    return [*SPECIAL, *([] if phones else [SPACE]), *kept], left_out


def write_vocabulary(path: Path, symbols: Sequence[str]) -> None:
    """Write one symbol per line. Raises UserError if the file exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path}: exists; choose another name")
    write_text(path, "".join(f"{symbol}\n" for symbol in symbols))


def describe_characters(symbol: str) -> str:
    """The code points and Unicode names of the characters that are not ASCII; empty if all are."""
    return ", ".join(
        f"U+{ord(character):04X} {unicodedata.name(character, 'no name')}"
        for character in symbol
        if not character.isascii() or not character.isprintable()
    )
