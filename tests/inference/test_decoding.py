"""Beam search agrees with a search over all paths, and with a language model small enough to compute by hand."""

from __future__ import annotations

import base64
import gzip
import zlib
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from w2vscale.data.transcripts import labels_to_text
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder

pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")

VOCABULARY = ["<pad>", "|", "A", "B", "C"]
TOY = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-2\t<unk>
-99\t<s>\t-0.3
-0.7\t</s>
-0.5\tAB\t-0.3
-1.5\tAC\t-0.3

\\2-grams:
-0.2\t<s> AB
-1.2\tAB AC
-0.1\tAB AB

\\end\\
"""
BINARY_TOY = zlib.decompress(
    base64.b64decode(
        "eNrLzU0sUMjJVcgoKSmw0tfPzkhNTMtMzUnRS87P1U/OT0lVSMsvyk0sUShLLSrOzM9TMOViQIAGeyCxnxFI/AcCkAgjVIYJTB6w"
        "Z4KKgTArVI4ZyQQWKF1Qp7jXsq2UYd30FZ0/vx4x/XnsLdvx77O8uHK+f6wtfpCNpOUAyGIE99ihWTNn7kOS3o/KZwDzYe4yNjbe"
        "D9KP7AZ0NyGDy2fO/Fk6c+bJ7Wlpz+SQJWxK87LtGGyK7RgcnRkcnRhs9IFMAPlIRt8="
    )
)
"""TOY, converted by `build_binary trie` of KenLM."""
AC_RATHER_THAN_AB = torch.tensor(
    [
        [0.05, 0.05, 0.80, 0.05, 0.05],
        [0.10, 0.05, 0.05, 0.30, 0.50],
        [0.10, 0.80, 0.03, 0.03, 0.04],
        [0.05, 0.05, 0.80, 0.05, 0.05],
        [0.10, 0.05, 0.05, 0.35, 0.45],
    ]
).log()


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    path = tmp_path / "toy.arpa"
    path.write_text(TOY)
    return path


def written(search: BeamSearch | None, logits_TV: Tensor = AC_RATHER_THAN_AB) -> str:
    decoder = build_decoder(VOCABULARY, search)
    return decoder.text(decoder.reduce(logits_TV))


def most_probable_text(log_probabilities_TV: Tensor) -> str:
    """The text with the highest total probability over all paths."""
    totals: dict[str, float] = {}
    frames, symbols = log_probabilities_TV.shape
    for path in product(range(symbols), repeat=frames):
        probability = float(log_probabilities_TV[range(frames), path].sum().exp())
        joined = [s for place, s in enumerate(path) if place == 0 or s != path[place - 1]]
        text = "".join(VOCABULARY[s] for s in joined if s != 0)
        totals[text] = totals.get(text, 0.0) + probability
    return max(totals, key=lambda text: totals[text])


def test_a_wide_beam_finds_the_most_probable_text() -> None:
    # The most probable path is all blanks, but the paths of A are more probable together.
    hidden = torch.tensor([[0.6, 0.0, 0.4, 0.0, 0.0]] * 2).clamp(min=1e-6).log()
    assert written(None, hidden) == ""
    assert written(BeamSearch(beam=100), hidden) == "A"
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3.0 * torch.randn(5, 5, generator=generator)
        expected = most_probable_text(logits.log_softmax(dim=1))
        assert written(BeamSearch(beam=1000), logits) == " ".join(expected.replace("|", " ").split())


def test_repetitions_with_a_blank_between_stay() -> None:
    path = torch.full((5, 5), -9.0)
    path[range(5), [2, 0, 2, 2, 3]] = 0.0
    assert written(None, path) == written(BeamSearch(beam=20), path) == "AAB"


def test_the_language_model_prefers_its_sentence(lm: Path) -> None:
    assert written(None) == "AC AC"
    assert written(BeamSearch(lm=lm)) == "AB AB"


def test_a_language_model_of_weight_0_has_no_effect(lm: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("AB\n\nAC\n")
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = 2.0 * torch.randn(12, 5, generator=generator)
        without = written(BeamSearch(lexicon=tmp_path / "words.txt", word_score=-0.5), logits)
        assert written(BeamSearch(lm=lm, lm_weight=0.0, word_score=-0.5), logits) == without
        assert set(without.split()) <= {"AB", "AC"}


def test_a_zipped_model_and_a_lexicon_of_spellings(lm: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "toy.arpa.gz"
    zipped.write_bytes(gzip.compress(lm.read_bytes()))
    assert written(BeamSearch(lm=zipped)) == "AB AB"
    # Here AB is spelled A C, and XY cannot be spelled.
    (tmp_path / "spelled.txt").write_text("AB A C\nXY\n")
    messages: list[str] = []
    decoder = build_decoder(VOCABULARY, BeamSearch(lm=lm, lexicon=tmp_path / "spelled.txt"), messages.append)
    assert decoder.text(decoder.reduce(AC_RATHER_THAN_AB)) == "AB AB"
    assert "skipping 1 words" in messages[0] and "XY" in messages[0]


def test_duplicate_words_and_special_tokens_of_a_lexicon_are_ignored(lm: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    (tmp_path / "once.txt").write_text("AB\nAC\n")
    (tmp_path / "twice.txt").write_text("<unk>\n<s>\nAB\nAC\nAC\nAC A C |\nAC\n")
    for _ in range(20):
        logits = 2.0 * torch.randn(12, 5, generator=generator)
        once, twice = (
            written(BeamSearch(lm=lm, lexicon=tmp_path / f"{name}.txt", lm_weight=0.5), logits)
            for name in ("once", "twice")
        )
        assert once == twice


def test_kenlms_binary_needs_a_lexicon(tmp_path: Path) -> None:
    (tmp_path / "toy.binary").write_bytes(BINARY_TOY)
    (tmp_path / "words.txt").write_text("AB\nAC\n")
    assert written(BeamSearch(lm=tmp_path / "toy.binary", lexicon=tmp_path / "words.txt")) == "AB AB"
    with pytest.raises(UserError, match="a binary model does not list its words; add --lexicon FILE"):
        build_decoder(VOCABULARY, BeamSearch(lm=tmp_path / "toy.binary"))


def test_words_have_the_case_of_the_vocabulary(tmp_path: Path) -> None:
    lower = tmp_path / "lower.arpa"
    lower.write_text(TOY.replace("AB", "ab").replace("AC", "ac"))
    assert written(BeamSearch(lm=lower)) == "AB AB"


def test_unusable_files_are_named(lm: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(99))
    (tmp_path / "text").write_text("AB AC\n")
    (tmp_path / "broken.arpa").write_text(TOY.replace("-0.5\tAB", "minus\tAB"))
    zipped = bytearray(gzip.compress(lm.read_bytes()))
    zipped[20:40] = bytes(20)
    (tmp_path / "damaged.arpa.gz").write_bytes(zipped)
    (tmp_path / "none.txt").write_text("XY\n")
    (tmp_path / "words.txt").write_text("AB\n")
    for search, message in (
        (BeamSearch(lm=tmp_path / "missing.arpa"), r"--lm .*missing\.arpa: cannot be read: No such file"),
        (BeamSearch(lm=tmp_path / "missing", lexicon=tmp_path / "words.txt"), r"--lm .*missing: no such file"),
        (BeamSearch(lm=tmp_path / "binary", lexicon=tmp_path / "words.txt"), "KenLM cannot load it"),
        (BeamSearch(lm=tmp_path / "text"), "not an ARPA file or a binary KenLM file"),
        (BeamSearch(lm=tmp_path / "damaged.arpa.gz"), r"--lm .*damaged\.arpa\.gz: cannot be read"),
        (BeamSearch(lm=tmp_path / "broken.arpa"), "KenLM cannot load it"),
        (BeamSearch(lexicon=tmp_path / "missing.txt"), r"--lexicon .*missing\.txt: cannot be read: No such file"),
        (BeamSearch(lexicon=tmp_path / "none.txt"), "none of its 1 words can be spelled"),
    ):
        with pytest.raises(UserError, match=message):
            build_decoder(VOCABULARY, search)
    with pytest.raises(UserError, match="need a vocabulary of characters"):
        build_decoder(["<pad>", "A"], BeamSearch(lm=lm))


def test_letters_of_several_characters_spell_words(lm: Path, tmp_path: Path) -> None:
    vocabulary = ["<pad>", "|", "A", "B", "AB"]
    (tmp_path / "words.txt").write_bytes("AB\nab\n".encode("utf-16"))
    logits = torch.full((3, 5), -9.0)
    logits[range(3), [4, 1, 2]] = 0.0
    decoder = build_decoder(vocabulary, BeamSearch(lexicon=tmp_path / "words.txt"))
    assert decoder.text(decoder.reduce(logits[:1])) == "AB"
    decoder = build_decoder(vocabulary, None)
    assert decoder.text(decoder.reduce(logits)) == "AB A"


def test_phones_have_spaces_between_them_and_no_words(lm: Path) -> None:
    vocabulary = ["<pad>", "sil", "ax", "t"]
    logits = torch.full((4, 4), -9.0)
    logits[range(4), [1, 0, 2, 3]] = 0.0
    for search in (None, BeamSearch(beam=9)):
        decoder = build_decoder(vocabulary, search, spaced=True)
        assert decoder.text(decoder.reduce(logits)) == "sil ax t"
    with pytest.raises(UserError, match="need a vocabulary of letters; the text of this model is symbols with spaces"):
        build_decoder(vocabulary, BeamSearch(lm=lm), spaced=True)


def test_options() -> None:
    assert BeamSearch.from_options(None, None, None, lm_weight=2.0, word_score=-1.0) is None
    found = BeamSearch.from_options(None, Path("a/4-gram.arpa"), None, lm_weight=1.5, word_score=0.0)
    assert found is not None and found.description() == "beam 50, 4-gram.arpa (weight 1.5, word score 0)"
    assert (
        BeamSearch(9, Path("4.bin"), Path("a/words"))
        .description()
        .endswith(", 4.bin (weight 2, word score -1), words of words")
    )


def test_text_is_without_blanks_and_has_other_special_symbols() -> None:
    vocabulary = ["<pad>", "<s>", "▁A", "B", "|"]
    assert labels_to_text([2, 0, 3, 2, 4, 3, 1, 0], vocabulary) == "AB A B<s>"
    assert labels_to_text([1, 2, 0, 1], ["<pad>", "e", "\u0301"]) == "ée"
