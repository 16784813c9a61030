"""CTC decoding: greedy, or a beam search with a lexicon and an n-gram language model (flashlight-text)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor

from w2vscale.data.transcripts import BLANK, PIECE_SPACE, SPACE, Transcripts
from w2vscale.errors import UserError

SPECIAL_TOKENS = {"<s>", "</s>", "<pad>"}
"""Symbols that are not part of a transcript."""

IMPOSSIBLE = -1e4
"""The log probability of a symbol that the search must not choose."""

KENLM_MAGIC = b"mmap lm"
"""The first bytes of a binary KenLM file."""


class Decoder(Protocol):
    """Turns the logits of an utterance into text. Both methods are pure functions of their arguments."""

    def reduce(self, logits_TV: Tensor) -> Tensor:
        """Reduce the logits of some frames to what decoding needs: [T, ...], on the CPU."""

    def text(self, reduced: Tensor) -> str:
        """Decode an utterance, given the reduced logits of all its frames."""


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search, as flashlight-text defines them; the defaults are those of fairseq for wav2vec 2.0.

    The score of a hypothesis is log p(symbols | frames) + `lm_weight` * log10 p(words) + `word_score` * (number of
    words).
    """

    beam: int = 50
    """The number of hypotheses that are kept after each frame."""
    lm: Path | None = None
    """A word n-gram model, in ARPA format (gzipped or not) or KenLM's binary format, which also needs `lexicon`."""
    lexicon: Path | None = None
    """A file with one word per line, optionally followed by its spelling in symbols. The output is limited to these
    words; by default to the words of an ARPA model. Words such as `<unk>` are ignored."""
    lm_weight: float = 2.0
    word_score: float = -1.0
    threshold: float = 25.0
    """Hypotheses whose score is lower than the best by more than this are dropped."""

    @classmethod
    def from_options(
        cls, beam: int | None, lm: Path | None, lexicon: Path | None, *, lm_weight: float, word_score: float
    ) -> BeamSearch | None:
        """Return the search for a set of command-line options, or None (greedy) without the first three."""
        if beam is None and lm is None and lexicon is None:
            return None
        return cls(beam or cls.beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score)

    def description(self) -> str:
        """The search in a few words, for results."""
        parts = [f"beam {self.beam}"]
        if self.lm is not None:
            parts.append(f"{self.lm.name} (weight {self.lm_weight:g}, word score {self.word_score:g})")
        if self.lexicon is not None:
            parts.append(f"words of {self.lexicon.name}")
        return ", ".join(parts)


class GreedyDecoder:
    """Takes the most probable symbol of each frame, merges repetitions and removes blanks."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._vocabulary = vocabulary

    def reduce(self, logits_TV: Tensor) -> Tensor:
        """Return the most probable symbols [T]."""
        return logits_TV.argmax(dim=1).cpu()

    def text(self, reduced: Tensor) -> str:
        """See `Decoder.text`."""
        merged = torch.unique_consecutive(reduced).tolist()
        return labels_to_text([symbol for symbol in merged if symbol != BLANK], self._vocabulary)


class _BeamSearchDecoder:
    def reduce(self, logits_TV: Tensor) -> Tensor:
        """Return log probabilities [T, V]."""
        return logits_TV.float().log_softmax(dim=1).cpu()


class LexiconFreeDecoder(_BeamSearchDecoder):
    """Searches for the most probable sequence of symbols."""

    def __init__(self, vocabulary: Sequence[str], search: BeamSearch) -> None:
        library = _flashlight()
        self._vocabulary = vocabulary
        options = library.LexiconFreeDecoderOptions(
            beam_size=search.beam,
            beam_size_token=len(vocabulary),
            beam_threshold=search.threshold,
            lm_weight=0.0,
            sil_score=0.0,
            log_add=True,
            criterion_type=library.CriterionType.CTC,
        )
        self._decoder = library.LexiconFreeDecoder(options, library.ZeroLM(), BLANK, BLANK, [])

    def text(self, reduced: Tensor) -> str:
        """See `Decoder.text`."""
        found = _decode(self._decoder, reduced)
        # One symbol per frame, plus one before the first and one after the last.
        path = [symbol for symbol, following in pairwise([*found.tokens, -1]) if symbol != following]
        return labels_to_text([symbol for symbol in path if symbol != BLANK], self._vocabulary)


class LexiconDecoder(_BeamSearchDecoder):
    """Searches for the most probable sequence of words of a lexicon, with an n-gram model if there is one."""

    def __init__(self, vocabulary: Sequence[str], search: BeamSearch, log: Callable[[str], None]) -> None:
        library = _flashlight()
        if SPACE not in vocabulary:
            raise UserError(f"--lm and --lexicon need a vocabulary of characters with {SPACE!r} as the space")
        self._space = vocabulary.index(SPACE)
        words, spellings = _lexicon(search, vocabulary, log)
        normalised = Transcripts(vocabulary).normalised
        self._words = [normalised(word) for word in words]
        lm = library.ZeroLM() if search.lm is None else _language_model(search.lm, words)
        trie = library.Trie(len(vocabulary), self._space)
        start = lm.start(False)
        for number, labels in spellings:
            _, score = lm.score(start, number)
            trie.insert(labels, number, score)
        trie.smear(library.SmearingMode.MAX)
        options = library.LexiconDecoderOptions(
            beam_size=search.beam,
            beam_size_token=len(vocabulary),
            beam_threshold=search.threshold,
            lm_weight=search.lm_weight if search.lm is not None else 0.0,
            word_score=search.word_score,
            unk_score=-float("inf"),
            sil_score=0.0,
            log_add=True,
            criterion_type=library.CriterionType.CTC,
        )
        self._decoder = library.LexiconDecoder(options, trie, lm, self._space, BLANK, len(words), [], False)

    def text(self, reduced: Tensor) -> str:
        """See `Decoder.text`."""
        # In the trie every word ends with a space. An extra frame provides the space of the last word.
        end_1V = torch.full_like(reduced[:1], IMPOSSIBLE)
        end_1V[0, self._space] = 0.0
        found = _decode(self._decoder, torch.cat([reduced, end_1V]))
        return " ".join(self._words[word] for word in found.words if word >= 0)


def build_decoder(
    vocabulary: Sequence[str], search: BeamSearch | None, log: Callable[[str], None] = lambda text: None
) -> Decoder:
    """Return the decoder for a beam search, or a greedy decoder if `search` is None.

    Raises:
        UserError: flashlight-text is not installed, or the lexicon or language model is unusable.
    """
    if search is None:
        return GreedyDecoder(vocabulary)
    if search.lm is None and search.lexicon is None:
        return LexiconFreeDecoder(vocabulary, search)
    return LexiconDecoder(vocabulary, search, log)


def labels_to_text(labels: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Join the symbols of labels to a text, with spaces for `|` and `▁` and without special tokens."""
    symbols = [vocabulary[label] for label in labels]
    joined = "".join(symbol for symbol in symbols if symbol not in SPECIAL_TOKENS)
    return " ".join(joined.replace(SPACE, " ").replace(PIECE_SPACE, " ").split())


def _decode(decoder: Any, log_probabilities_TV: Tensor) -> Any:
    emissions_TV = log_probabilities_TV.contiguous()
    return decoder.decode(emissions_TV.data_ptr(), *emissions_TV.shape)[0]


def _lexicon(
    search: BeamSearch, vocabulary: Sequence[str], log: Callable[[str], None]
) -> tuple[list[str], list[tuple[int, list[int]]]]:
    """Return the words, and pairs of a word number and the labels of a spelling, including the space at its end."""
    if search.lexicon is not None:
        path, entries = search.lexicon, _lexicon_entries(search.lexicon)
    else:
        assert search.lm is not None
        path, entries = search.lm, _arpa_words(search.lm)
    spelling = Transcripts(vocabulary)
    labels_of = {symbol: label for label, symbol in enumerate(vocabulary) if label != BLANK}
    numbers: dict[str, int] = {}
    spellings: dict[tuple[int, tuple[int, ...]], None] = {}  # an ordered set
    skipped = []
    for word, given_symbols in entries:
        symbols = given_symbols or list(spelling.normalised(word))
        if symbols[-1] != SPACE:
            symbols.append(SPACE)
        if all(symbol in labels_of for symbol in symbols):
            number = numbers.setdefault(word, len(numbers))
            spellings[number, tuple(labels_of[symbol] for symbol in symbols)] = None
        else:
            skipped.append(word)
    if not numbers:
        raise UserError(f"{path}: none of its {len(skipped)} words can be spelled with the vocabulary of the model")
    if skipped:
        log(f"{path}: skipping {len(skipped)} words that the vocabulary cannot spell ({skipped[0]} …)")
    return list(numbers), [(number, list(labels)) for number, labels in spellings]


def _lexicon_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield words and their spellings (empty if not given), without words such as `<unk>`."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                word, *symbols = line.split() or [""]
                if word and not word.startswith("<"):
                    yield word, symbols
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lexicon {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _arpa_words(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the unigrams of an ARPA file, gzipped or not, except `<s>`, `</s>` and `<unk>`."""
    in_unigrams = False
    try:
        with _open(path) as file:
            if file.read(len(KENLM_MAGIC)) == KENLM_MAGIC:
                raise UserError(f"--lm {path}: a binary model does not list its words; add --lexicon FILE")
            for line in file:
                if line.startswith(b"\\"):
                    if in_unigrams:
                        return
                    in_unigrams = line.strip() == b"\\1-grams:"
                elif in_unigrams and len(fields := line.decode().split()) >= 2 and not fields[1].startswith("<"):
                    yield fields[1], []
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"--lm {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise UserError(f"--lm {path}: not an ARPA file or a binary KenLM file")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _language_model(path: Path, words: Sequence[str]) -> Any:
    library = _flashlight()
    if not path.is_file():
        raise UserError(f"--lm {path}: no such file")
    try:
        return library.KenLM(str(path), library.Dictionary([*words, "<unk>"]))
    except RuntimeError as error:
        raise UserError(f"--lm {path}: KenLM cannot load it: {str(error).splitlines()[-1]}") from None


def _flashlight() -> SimpleNamespace:
    """Import the parts of flashlight-text that are used here."""
    try:
        from flashlight.lib.text import decoder
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ImportError:
        raise UserError("flashlight-text is not installed: pip install 'w2vscale[decode]'") from None
    return SimpleNamespace(**vars(decoder), KenLM=KenLM, Dictionary=Dictionary)
