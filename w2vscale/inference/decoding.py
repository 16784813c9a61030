"""From the scores of symbols in each frame to text: greedy, or a beam search with a lexicon and an n-gram model."""

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

from w2vscale.data.transcripts import PIECE_SPACE, SPACE, Transcripts
from w2vscale.errors import UserError
from w2vscale.objectives.ctc import BLANK

MARKS = {"<s>", "</s>", "<pad>"}

IMPOSSIBLE = -1e4
"""A log probability."""

BINARY = b"mmap lm"
"""How KenLM's binary files begin."""


class Decoder(Protocol):
    """Writes an utterance's text. Pure functions of their arguments."""

    def reduce(self, logits_TV: Tensor) -> Tensor:
        """What is kept of some frames [T, ...], on the CPU."""

    def text(self, kept: Tensor) -> str:
        """The text of an utterance, from what is kept of all its frames."""


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search, with flashlight's meanings and fairseq's values for wav2vec 2.0.

    A hypothesis scores its frames' natural log probabilities + `lm_weight` * log10 p(words) + `word_score` * words.
    """

    beam: int = 50
    """Hypotheses that are kept."""
    lm: Path | None = None
    """A word n-gram model, ARPA or KenLM's binary; needs `lexicon` unless it is ARPA, whose words then are one."""
    lexicon: Path | None = None
    """One word a line, marks such as `<unk>` apart: nothing else is written. What follows a word, if anything, is its
    spelling in symbols."""
    lm_weight: float = 2.0
    word_score: float = -1.0
    threshold: float = 25.0
    """Hypotheses so far below the best are dropped."""

    def told(self) -> str:
        """The search in words."""
        parts = [f"beam {self.beam}"]
        if self.lm is not None:
            parts.append(f"{self.lm.name} (weight {self.lm_weight:g}, word score {self.word_score:g})")
        if self.lexicon is not None:
            parts.append(f"words of {self.lexicon.name}")
        return ", ".join(parts)


def beam_search(
    beam: int | None, lm: Path | None, lexicon: Path | None, *, lm_weight: float, word_score: float
) -> BeamSearch | None:
    """What a command's options ask for: greedy decoding (None) without any of the first three."""
    if beam is None and lm is None and lexicon is None:
        return None
    return BeamSearch(beam or BeamSearch.beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score)


class Greedy:
    """The best path: the most probable symbol of each frame, repetitions joined, blanks left out."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._vocabulary = vocabulary

    def reduce(self, logits_TV: Tensor) -> Tensor:
        """See `Decoder.reduce`: symbols [T]."""
        return logits_TV.argmax(dim=1).cpu()

    def text(self, kept: Tensor) -> str:
        """See `Decoder.text`."""
        return text_of(
            [symbol for symbol in torch.unique_consecutive(kept).tolist() if symbol != BLANK], self._vocabulary
        )


class _Searched:
    """What the beam searches share: log probabilities are kept."""

    def reduce(self, logits_TV: Tensor) -> Tensor:
        """See `Decoder.reduce`: log probabilities [T, V]."""
        return logits_TV.float().log_softmax(dim=1).cpu()


class LexiconFreeBeam(_Searched):
    """The most probable path of all, as far as the beam reaches."""

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

    def text(self, kept: Tensor) -> str:
        """See `Decoder.text`."""
        found = _decode(self._decoder, kept)
        # A symbol for each frame, and one before and after them.
        path = [symbol for symbol, following in pairwise([*found.tokens, -1]) if symbol != following]
        return text_of([symbol for symbol in path if symbol != BLANK], self._vocabulary)


class LexiconBeam(_Searched):
    """The most probable words of a lexicon, under an n-gram model if there is one."""

    def __init__(self, vocabulary: Sequence[str], search: BeamSearch, log: Callable[[str], None]) -> None:
        library = _flashlight()
        if SPACE not in vocabulary:
            raise UserError(f"--lm and --lexicon are for vocabularies of characters with {SPACE!r} for the space")
        self._space = vocabulary.index(SPACE)
        words, spellings = _lexicon(search, vocabulary, log)
        normalised = Transcripts(vocabulary).normalised
        self._written = [normalised(word) for word in words]
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

    def text(self, kept: Tensor) -> str:
        """See `Decoder.text`."""
        # Words end with a space: the last one gets a frame for it.
        end_1V = torch.full_like(kept[:1], IMPOSSIBLE)
        end_1V[0, self._space] = 0.0
        found = _decode(self._decoder, torch.cat([kept, end_1V]))
        return " ".join(self._written[word] for word in found.words if word >= 0)


def build_decoder(
    vocabulary: Sequence[str], search: BeamSearch | None, log: Callable[[str], None] = lambda text: None
) -> Decoder:
    """Greedy without settings of a search.

    Raises:
        UserError: flashlight-text is not installed; a lexicon or language model cannot be used.
    """
    if search is None:
        return Greedy(vocabulary)
    if search.lm is None and search.lexicon is None:
        return LexiconFreeBeam(vocabulary, search)
    return LexiconBeam(vocabulary, search, log)


def text_of(labels: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Labels as text: spaces for `|` and `▁`, without sentence marks."""
    symbols = [vocabulary[label] for label in labels]
    joined = "".join(symbol for symbol in symbols if symbol not in MARKS)
    return " ".join(joined.replace(SPACE, " ").replace(PIECE_SPACE, " ").split())


def _decode(decoder: Any, log_probabilities_TV: Tensor) -> Any:
    emissions_TV = log_probabilities_TV.contiguous()
    return decoder.decode(emissions_TV.data_ptr(), *emissions_TV.shape)[0]


def _lexicon(
    search: BeamSearch, vocabulary: Sequence[str], log: Callable[[str], None]
) -> tuple[list[str], list[tuple[int, list[int]]]]:
    """The words, and of each spelling its word's number and its labels with the space that ends them."""
    if search.lexicon is not None:
        source, entries = search.lexicon, _lexicon_entries(search.lexicon)
    else:
        assert search.lm is not None
        source, entries = search.lm, _arpa_words(search.lm)
    spelling = Transcripts(vocabulary)
    labels_of = {symbol: label for label, symbol in enumerate(vocabulary) if label != BLANK}
    numbers: dict[str, int] = {}
    spellings: dict[tuple[int, tuple[int, ...]], None] = {}  # in order, each once
    unspelled = []
    for word, given in entries:
        symbols = given or list(spelling.normalised(word))
        if symbols[-1] != SPACE:
            symbols.append(SPACE)
        if all(symbol in labels_of for symbol in symbols):
            number = numbers.setdefault(word, len(numbers))
            spellings[number, tuple(labels_of[symbol] for symbol in symbols)] = None
        else:
            unspelled.append(word)
    if not numbers:
        raise UserError(f"{source}: the vocabulary spells none of its {len(unspelled)} words")
    if unspelled:
        log(f"{source}: {len(unspelled)} words are left out: the vocabulary does not spell them ({unspelled[0]} …)")
    return list(numbers), [(number, list(labels)) for number, labels in spellings]


def _lexicon_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Words and their spellings, if any, without marks such as `<unk>`."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                word, *symbols = line.split() or [""]
                if word and not word.startswith("<"):
                    yield word, symbols
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lexicon {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _arpa_words(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The unigrams of an ARPA file, gzipped or not, without the marks of sentences and the unknown word."""
    unigrams = False
    try:
        with _opened(path) as file:
            if file.read(len(BINARY)) == BINARY:
                raise UserError(f"--lm {path}: is binary, its words cannot be listed: name them with --lexicon FILE")
            for line in file:
                if line.startswith(b"\\"):
                    if unigrams:
                        return
                    unigrams = line.strip() == b"\\1-grams:"
                elif unigrams and len(fields := line.decode().split()) >= 2 and not fields[1].startswith("<"):
                    yield fields[1], []
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"--lm {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise UserError(f"--lm {path}: neither an ARPA file nor KenLM's binary")


def _opened(path: Path) -> IO[bytes]:
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
    """The parts of flashlight-text that are used here."""
    try:
        from flashlight.lib.text import decoder
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ImportError:
        raise UserError("flashlight-text is not installed: pip install 'w2vscale[decode]'") from None
    return SimpleNamespace(**vars(decoder), KenLM=KenLM, Dictionary=Dictionary)
