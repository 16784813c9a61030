"""Times of words: exact for emissions that are known, greedy and with a beam search, and in every format."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse.utils import fastcopy
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.spelled import SPELLING
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import Pretrained
from w2vscale.inference.transcript_formats import ctm, line_of, subtitles
from w2vscale.inference.transcription import TimedWord, Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.inference.words import Word
from w2vscale.objectives import build_objective
from w2vscale.objectives.ctc import Ctc

VOCABULARY = ["<pad>", "|", "A", "B", "C"]


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


# ---------------------------------------------------------------- times


class Known(Ctc):
    """Emits a path, frame by frame, whatever the audio."""

    path = ""

    def logits(self, module: Any, hidden_TD: Tensor) -> Tensor:
        now, self.path = self.path[: len(hidden_TD)], self.path[len(hidden_TD) :]
        return emissions(now, self.vocabulary)


def knows(path: str, *overrides: str) -> Pretrained:
    """A small model that emits this path, and blanks after it, for the first utterance."""
    config = load_config("base", [*SPELLING, "model.layers=1", *overrides])
    objective = build_objective(config)
    known = Known(objective.settings, config.model, config.regularization, torch.float32)
    known.path = path.ljust(10_000, ".")
    return Pretrained(objective.build_model().eval(), config, known)


def only(pretrained: Pretrained, path: Path) -> Transcript:
    (found,) = transcribe(pretrained, find_utterances([path]))
    assert isinstance(found, Transcript)
    return found


def times(found: Transcript) -> list[tuple[str, float, float]]:
    return [(word.text, round(word.start, 6), round(word.duration, 6)) for word in found.words]


def test_times_are_in_the_recording(tmp_path: Path) -> None:
    """A cut that begins after 2.1 s of it, of the second channel."""
    stereo = np.stack([noise(4.0), noise(4.0, seed=1)], axis=1)
    cut = cut_of(write_audio(tmp_path / "talk.wav", stereo)).to_mono()[1].truncate(offset=2.1, duration=1.0)
    manifest = write_manifest(tmp_path / "cuts.jsonl", [fastcopy(cut, id="part")])
    found = only(knows("..AAB|...C"), manifest)
    assert (found.utterance, found.recording, found.channel) == ("part", cut.recording_id, 1)
    assert (found.start, found.duration, found.text) == (2.1, 1.0, "AB C")
    assert times(found) == [("AB", 2.14, 0.06), ("C", 2.28, 0.02)]


def test_frames_of_chunks_follow_each_other(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "long.wav", noise(70.0, rate=8_000), rate=8_000)
    words = {1: 0.0, 1164: 23.28, 2332: 46.64, 3497: 69.94}  # chunks of 3,499 frames end after 1,166 and 2,332
    text = list("." * 3499)
    for frame in words:
        text[frame : frame + 2] = "AB"
        text[frame - 1] = "|"
    found = only(knows("".join(text)), path)
    assert times(found) == [("AB", round(frame * 0.02, 6), 0.04) for frame in words]
    assert found.start == 0.0 and found.duration == 70.0


def test_the_last_word_ends_with_the_audio(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(0.99))
    layers = "[[16,10,5],[16,3,2],[16,3,2],[16,3,2],[16,3,2],[16,3,2],[16,3,2]]"  # padded, so that 50 frames fit
    found = only(knows("." * 49 + "A", "model.conv_padding=true", f"model.conv_layers={layers}"), path)
    assert times(found) == [("A", 0.98, 0.01)]


# ---------------------------------------------------------------- formats

TALK = Transcript("talk-2", "talk.wav", "my talk", 1, 10.0, 3.0, "A BC", (
    TimedWord("A", 10.02, 0.02, 0.5), TimedWord("BC", 10.0204, 0.0404, 1.0),
))  # fmt: skip
FIRST = replace(TALK, utterance="talk-1", start=2.0, text="D", words=(TimedWord("D", 4.98, 0.02, 0.123456),))
SILENT = replace(TALK, utterance="talk-3", start=13.0, text="", words=())


def test_text_and_json() -> None:
    assert line_of(TALK, "txt") == "talk-2\tA BC" and line_of(SILENT, "txt") == "talk-3\t"
    assert line_of(replace(TALK, utterance="a\tb\nc"), "txt") == "a\\u0009b\\u000ac\tA BC", "one line, two columns"
    assert json.loads(line_of(TALK, "json")) == {
        "utterance": "talk-2", "file": "talk.wav", "start": 10.0, "duration": 3.0, "text": "A BC",
        "words": [
            {"word": "A", "start": 10.02, "duration": 0.02, "score": 0.5},
            {"word": "BC", "start": 10.02, "duration": 0.041, "score": 1.0},
        ],
    }  # fmt: skip
    assert json.loads(line_of(SILENT, "json"))["words"] == []


def test_ctm_is_sorted_by_time() -> None:
    other = replace(FIRST, recording="a", channel=0)
    assert ctm([TALK, SILENT, FIRST, other]) == (
        "a 1 4.980 0.020 D 0.1235\n"
        "my_talk 2 4.980 0.020 D 0.1235\n"
        "my_talk 2 10.020 0.020 A 0.5000\n"
        "my_talk 2 10.020 0.041 BC 1.0000\n"
    )
    assert ctm([SILENT]) == ""


def spoken(*words: tuple[str, float, float]) -> Transcript:
    """Words with their start and end."""
    timed = tuple(TimedWord(text, start, end - start, 1.0) for text, start, end in words)
    return Transcript("u", "u.wav", "u", 0, 0.0, 3700.0, " ".join(word.text for word in timed), timed)


def test_subtitles_end_at_pauses_and_limits() -> None:
    long = "abcdefghijklmnopqrst"  # two in a line, four in a subtitle
    found = subtitles(
        [
            spoken(
                ("hello", 0.5, 0.9), ("world", 1.4, 1.8),  # 0.5 s between them
                ("again", 2.5, 2.6),  # 0.7 s after the word before
                *((long, 10.0 + number, 10.9 + number) for number in range(5)),
                ("slow", 20.0, 23.0), ("speech", 23.5, 27.0), ("ends", 27.1, 27.2),
                ("late", 3599.99, 3599.9996), ("end", 3699.9, 3699.98),
            )
        ]
    )  # fmt: skip
    assert (
        found
        == f"""1
00:00:00,500 --> 00:00:01,800
hello world

2
00:00:02,500 --> 00:00:03,500
again

3
00:00:10,000 --> 00:00:13,900
{long} {long}
{long} {long}

4
00:00:14,000 --> 00:00:15,000
{long}

5
00:00:20,000 --> 00:00:27,000
slow speech

6
00:00:27,100 --> 00:00:28,100
ends

7
00:59:59,990 --> 01:00:00,990
late

8
01:01:39,900 --> 01:01:40,000
end
"""
    )


def test_subtitles_of_utterances_are_one_sequence() -> None:
    assert subtitles([SILENT]) == ""
    lines = subtitles([TALK, SILENT, FIRST]).splitlines()
    assert [line for line in lines if "-->" in line] == [
        "00:00:04,980 --> 00:00:05,980",
        "00:00:10,020 --> 00:00:11,020",
    ]
    assert [line for line in lines if line.isdecimal()] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "vtt"], "--format vtt: choose one of txt, json, srt, ctm"),
        (
            ["--format", "srt"],
            "--format srt: a file of subtitles is of one recording, and there are 2; add --output DIR",
        ),
        (["--format", "ctm", "-o", "out"], "--output out: only applies to --format srt; ctm is printed, so use > FILE"),
    ],
)
def test_options_that_cannot_be_used(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("a.wav", "b.wav"):
        write_audio(tmp_path / name, noise(0.5))
    result = CliRunner().invoke(app, ["transcribe", str(tmp_path), str(tmp_path), *arguments])
    assert isinstance(result.exception, UserError) and str(result.exception) == message
