"""CTC decoding to words with their frames: greedy, or a beam search with a lexicon and an n-gram language model.

The beam search is that of flashlight-text. The frames of its words are those of its best hypothesis. They differ from a
forced alignment of the words only where the model is unsure of the frame, and take no more memory for long audio.
"""

from __future__ import annotations

import gzip
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from w2vscale.data.transcripts import Transcripts
from w2vscale.data.vocabulary import BLANK, SPACE
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_text
from w2vscale.inference.words import Word, given_words, words_of

BEAM_THRESHOLD = 25.0  # the search drops hypotheses whose score is lower than the best by more than this
IMPOSSIBLE = -1e4  # log probability of a symbol that the search must not choose
KENLM_MAGIC = b"mmap lm"  # the first bytes of a binary KenLM file


@dataclass(frozen=True)
class Decoder:
    """Two pure functions that turn the logits of an utterance into words."""

    reduce: Callable[[Tensor], Tensor]  # reduces logits [T, V] to what decoding needs: [T, ...] on the CPU
    words: Callable[[Tensor], list[Word]]  # decodes an utterance, given the reduced logits of all its frames

    def text(self, reduced: Tensor) -> str:
        """The text of an utterance."""
        return " ".join(word.text for word in self.words(reduced))


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search, as flashlight-text defines them; the defaults are those of fairseq for wav2vec 2.0.

    The score of a hypothesis is log p(symbols | frames) + `lm_weight` * log10 p(words) + `word_score` * (number of
    words). `lexicon` has one word per line, optionally followed by its spelling in symbols. The output is limited to
    these words; by default to the words of an ARPA model. Words such as `<unk>` are ignored.
    """

    beam: int = 50  # number of hypotheses that are kept after each frame
    lm: Path | None = None  # word n-gram model: ARPA, gzipped or not, or KenLM binary, which also needs `lexicon`
    lexicon: Path | None = None
    lm_weight: float = 2.0
    word_score: float = -1.0

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


def build_decoder(
    vocabulary: Sequence[str],
    search: BeamSearch | None,
    log: Callable[[str], None] = lambda text: None,
    *,
    spaced: bool = False,
) -> Decoder:
    """Return the decoder for a beam search, or a greedy decoder if `search` is None.

    If the text is `spaced`, it is the symbols with spaces between them, and has no words to search for.

    Raises UserError if flashlight-text is not installed, or the lexicon or language model cannot be used.
    """
    if search is None:
        return Decoder(_best, lambda best_T2: words_of(*_columns(best_T2), vocabulary, spaced=spaced))
    library = _flashlight()
    options = {
        "beam_size": search.beam,
        "beam_size_token": len(vocabulary),
        "beam_threshold": BEAM_THRESHOLD,
        "lm_weight": search.lm_weight if search.lm is not None else 0.0,
        "sil_score": 0.0,
        "log_add": True,
        "criterion_type": library.CriterionType.CTC,
    }
    if search.lm is None and search.lexicon is None:
        words = _symbol_search(vocabulary, options, library, spaced=spaced)
    elif spaced:
        raise UserError(
            "--lm and --lexicon need a vocabulary of letters; the text of this model is symbols with spaces (phones)"
        )
    else:
        words = _word_search(vocabulary, search, options, library, log)
    return Decoder(lambda logits_TV: logits_TV.float().log_softmax(dim=1).cpu(), words)


def _best(logits_TV: Tensor) -> Tensor:
    """The label of the best symbol of each frame and its log probability, [T, 2]."""
    best_T1 = logits_TV.argmax(dim=1, keepdim=True)
    log_probabilities_T1 = logits_TV.float().log_softmax(dim=1).gather(1, best_T1)
    return torch.cat([best_T1.float(), log_probabilities_T1], dim=1).cpu()


def _columns(best_T2: Tensor) -> tuple[list[int], list[float]]:
    return best_T2[:, 0].int().tolist(), best_T2[:, 1].tolist()


def _symbol_search(
    vocabulary: Sequence[str], options: dict[str, Any], library: Any, *, spaced: bool
) -> Callable[[Tensor], list[Word]]:
    """Return a search for the most probable sequence of symbols, given log probabilities [T, V]."""
    settings = library.LexiconFreeDecoderOptions(**options)
    decoder = library.LexiconFreeDecoder(settings, library.ZeroLM(), BLANK, BLANK, [])

    def words(log_probabilities_TV: Tensor) -> list[Word]:
        path_T = _path(_decode(decoder, log_probabilities_TV).tokens)
        return words_of(path_T, _along(path_T, log_probabilities_TV), vocabulary, spaced=spaced)

    return words


def _word_search(
    vocabulary: Sequence[str], search: BeamSearch, options: dict[str, Any], library: Any, log: Callable[[str], None]
) -> Callable[[Tensor], list[Word]]:
    """Return a search for the most probable words of a lexicon, with an n-gram model if there is one."""
    if SPACE not in vocabulary:
        raise UserError(f"--lm and --lexicon need a vocabulary of characters with {SPACE!r} as the space")
    space = vocabulary.index(SPACE)
    transcripts = Transcripts(vocabulary, spaced=False)
    words, spellings = _lexicon(search, vocabulary, transcripts, log)
    normalised = list(map(transcripts.normalised, words))
    lm = library.ZeroLM() if search.lm is None else _language_model(search.lm, words, library)
    trie = library.Trie(len(vocabulary), space)
    start = lm.start(False)
    for number, labels in spellings:
        _, score = lm.score(start, number)
        trie.insert(labels, number, score)
    trie.smear(library.SmearingMode.MAX)
    settings = library.LexiconDecoderOptions(**options, word_score=search.word_score, unk_score=-float("inf"))
    decoder = library.LexiconDecoder(settings, trie, lm, space, BLANK, len(words), [], False)

    def found_words(log_probabilities_TV: Tensor) -> list[Word]:
        # In the trie every word ends with a space. An extra frame provides the space of the last word.
        end_1V = torch.full_like(log_probabilities_TV[:1], IMPOSSIBLE)
        end_1V[0, space] = 0.0
        with_end_TV = torch.cat([log_probabilities_TV, end_1V])
        found = _decode(decoder, with_end_TV)
        path_T = _path(found.tokens)
        complete_T = [normalised[word] if word >= 0 else None for word in _path(found.words)]
        return given_words(path_T, _along(path_T, with_end_TV), complete_T, space=space)

    return found_words


def _path(found: Sequence[int]) -> list[int]:
    """What a search has found in each frame; it also has something before the first one and after the last one."""
    return list(found[1:-1])


def _along(path_T: Sequence[int], log_probabilities_TV: Tensor) -> list[float]:
    log_probabilities: list[float] = log_probabilities_TV[range(len(path_T)), path_T].tolist()
    return log_probabilities


def _decode(decoder: Any, log_probabilities_TV: Tensor) -> Any:
    emissions_TV = log_probabilities_TV.contiguous()
    return decoder.decode(emissions_TV.data_ptr(), *emissions_TV.shape)[0]


def _flashlight() -> SimpleNamespace:
    try:
        from flashlight.lib.text import decoder
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ImportError:
        raise UserError("flashlight-text is not installed: pip install 'w2vscale[decode]'") from None
    return SimpleNamespace(**vars(decoder), KenLM=KenLM, Dictionary=Dictionary)


def _language_model(path: Path, words: Sequence[str], library: Any) -> Any:
    if not path.is_file():
        raise UserError(f"--lm {path}: no such file{nearest_path(path)}")
    try:
        # An absolute path, because KenLM takes `-` for stdin.
        return library.KenLM(str(path.absolute()), library.Dictionary([*words, "<unk>"]))
    except (RuntimeError, ValueError) as error:  # ValueError: the message has bytes of the file, which are not UTF-8
        raise UserError(f"--lm {path}: KenLM cannot load it: {str(error).splitlines()[-1]}") from None


def _lexicon(
    search: BeamSearch, vocabulary: Sequence[str], transcripts: Transcripts, log: Callable[[str], None]
) -> tuple[list[str], list[tuple[int, tuple[int, ...]]]]:
    """Return the words, and pairs of a word number and the labels of a spelling, including the space at its end."""
    option, path, read = "--lexicon", search.lexicon, _lexicon_entries
    if path is None:
        option, path, read = "--lm", search.lm, _arpa_entries
    assert path is not None
    try:
        entries = list(read(path))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {path}: cannot be read: {reason}{nearest_path(path)}") from None
    labels_of = {
        unicodedata.normalize("NFC", symbol): label for label, symbol in enumerate(vocabulary) if label != BLANK
    }
    space = labels_of[SPACE]
    numbers: dict[str, int] = {}
    spellings: dict[tuple[int, tuple[int, ...]], None] = {}  # an ordered set
    skipped = []
    for word, given_symbols in entries:
        if word.startswith("<"):
            continue
        given = [unicodedata.normalize("NFC", symbol) for symbol in given_symbols]
        if given:
            labels, unknown = [labels_of.get(symbol, BLANK) for symbol in given], [*{*given} - {*labels_of}]
        else:
            labels, unknown = transcripts.encode(word)
        if unknown:
            skipped.append(word)
            continue
        number = numbers.setdefault(word, len(numbers))
        spellings[number, (*labels, space) if labels[-1] != space else tuple(labels)] = None
    if not numbers:
        raise UserError(f"{path}: none of its {len(skipped)} words can be spelled with the vocabulary of the model")
    if skipped:
        log(f"{path}: skipping {len(skipped)} words that the vocabulary cannot spell ({skipped[0]} …)")
    return list(numbers), list(spellings)


def _lexicon_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield words and their spellings (empty if not given)."""
    for line in read_text(path).splitlines():
        if fields := line.split():
            yield fields[0], fields[1:]


def _arpa_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the unigrams of an ARPA file, gzipped or not, without spellings."""
    in_unigrams = False
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if file.read(len(KENLM_MAGIC)) == KENLM_MAGIC:
            raise UserError(f"--lm {path}: a binary model does not list its words; add --lexicon FILE")
        for line in file:
            if line.startswith(b"\\"):
                if in_unigrams:
                    return
                in_unigrams = line.strip() == b"\\1-grams:"
            elif in_unigrams and len(fields := line.decode().split()) >= 2:
                yield fields[1], []
    raise UserError(f"--lm {path}: not an ARPA file or a binary KenLM file")
