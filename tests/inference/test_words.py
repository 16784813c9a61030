"""Times of words: exact for emissions that are known, greedy and with a beam search, and in every format."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, write_audio, write_manifest
from tests.helpers.exported import save_model
from tests.helpers.spelled import SPELLING
from w2vscale.checkpoint.format import TrainState
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import Pretrained, load
from w2vscale.inference.transcript_formats import ctm, line_of, subtitles
from w2vscale.inference.transcription import TimedWord, Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.inference.words import Word
from w2vscale.objectives import build_objective

VOCABULARY = ["<pad>", "|", "A", "B", "C"]
SECOND_OF_FRAMES = 50


def emissions(path: str, vocabulary: list[str] = VOCABULARY, *, probability: float = 0.9) -> Tensor:
    """Logits [T, V] that emit a symbol in each frame, with this probability; `.` is the blank."""
    labels = [vocabulary.index(symbol) if symbol != "." else 0 for symbol in path]
    logits = torch.full((len(labels), len(vocabulary)), (1.0 - probability) / (len(vocabulary) - 1))
    logits[range(len(labels)), labels] = probability
    return logits.log()


def decoded(logits_TV: Tensor, search: BeamSearch | None = None) -> list[Word]:
    decoder = build_decoder(VOCABULARY, search)
    return decoder.words(decoder.reduce(logits_TV))


def spans(words: list[Word]) -> list[tuple[str, int, int]]:
    return [(word.text, word.first, word.end) for word in words]


PATHS = {
    "": [],
    "....": [],
    "||.|": [],
    "A": [("A", 0, 1)],
    "..AAB..C.||.B.B..": [("ABC", 2, 8), ("BB", 12, 15)],
    "|A|B": [("A", 1, 2), ("B", 3, 4)],
}


@pytest.mark.parametrize("path", PATHS)
def test_frames_of_words(path: str) -> None:
    assert spans(decoded(emissions(path))) == PATHS[path]


@pytest.mark.parametrize("path", [path for path in PATHS if path])
def test_a_beam_search_finds_the_same_frames(path: str, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    assert spans(decoded(emissions(path, probability=0.99), BeamSearch(beam=20))) == PATHS[path]
    (tmp_path / "words.txt").write_text("A\nB\nABC\nBB\n")
    search = BeamSearch(beam=20, lexicon=tmp_path / "words.txt", word_score=0.0)
    assert spans(decoded(emissions(path, probability=0.99), search)) == PATHS[path]


def test_a_word_that_a_lexicon_spells_in_another_way(tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    (tmp_path / "words.txt").write_text("ABBA C B\nA A\n")
    search = BeamSearch(beam=20, lexicon=tmp_path / "words.txt", word_score=0.0)
    assert spans(decoded(emissions(".C.B||.A."), search)) == [("ABBA", 1, 4), ("A", 7, 8)]


def test_scores_are_geometric_means_over_the_frames_of_symbols() -> None:
    logits = torch.cat([emissions("A", probability=p) for p in (0.5, 0.8)] + [emissions(".|B", probability=0.7)])
    assert [word.score for word in decoded(logits)] == pytest.approx([math.sqrt(0.5 * 0.8), 0.7])


def test_symbols_of_phones_are_words_and_pieces_have_their_spaces() -> None:
    decoder = build_decoder(["<pad>", "sil", "ax", "t"], None, spaced=True)
    phones = torch.eye(4)[[1, 1, 0, 2, 3, 0, 3]] * 20.0
    assert spans(decoder.words(decoder.reduce(phones))) == [("sil", 0, 2), ("ax", 3, 4), ("t", 4, 5), ("t", 6, 7)]
    decoder = build_decoder(["<pad>", "▁a", "b▁c", "e", "\u0301"], None)
    pieces = torch.eye(5)[[0, 1, 2, 2, 3, 4, 1]] * 20.0
    assert spans(decoder.words(decoder.reduce(pieces))) == [("ab", 1, 4), ("cé", 2, 6), ("a", 6, 7)]


# ---------------------------------------------------------------- from audio to files


def loudness_model() -> Pretrained:
    """A model without chance: its logits are those of a path that the first samples of each frame name."""
    raise NotImplementedError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config("base", [*SPELLING, "model.layers=1"])
    model = build_objective(config).build_model()
    return save_model(tmp_path_factory.mktemp("run"), config, model.state_dict(), TrainState(update=1))
