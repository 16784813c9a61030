"""`w2vscale data vocabulary`: the symbols of transcripts, counted, and written as a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from lhotse import SupervisionSegment
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from w2vscale.cli.app import app
from w2vscale.corpora import vocabulary as vocabulary_module
from w2vscale.corpora.vocabulary import count_symbols
from w2vscale.data.transcripts import Transcripts
from w2vscale.data.vocabulary import check_vocabulary, read_vocabulary
from w2vscale.errors import UserError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def write_transcripts(folder: Path, texts: Sequence[str]) -> Path:
    audio = write_audio(folder / "audio.flac", noise(0.5))
    cuts = []
    for number, text in enumerate(texts):
        cut = cut_of(audio, identifier=f"u{number}")
        cut.id = f"u{number}"
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, text=text)]
        cuts.append(cut)
    return write_manifest(folder / "cuts.jsonl", cuts)


def run(*arguments: object) -> str:
    """What the command prints, or its error; runs of spaces are single ones."""
    result = CliRunner().invoke(app, ["data", "vocabulary", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return re.sub(" +", " ", result.stdout).replace(" \n", "\n")


def test_symbols_are_letters_with_their_marks_by_frequency(tmp_path: Path) -> None:
    manifest = write_transcripts(tmp_path, ["o\u0308o\u0308 ɔ̃b", "ö  b", "", " "])
    printed = run(manifest, "-o", tmp_path / "v.txt")
    assert "ö 3 50.000% U+00F6 LATIN SMALL LETTER O WITH DIAERESIS u0\n" in printed
    assert "b 2 33.333% u0\n" in printed
    assert "U+0254 LATIN SMALL LETTER OPEN O, U+0303 COMBINING TILDE u0\n" in printed
    assert "3 symbols, 6 times in 2 transcripts; 2 utterances without a transcript\n" in printed
    assert f"8 symbols; use it with objective.vocabulary={tmp_path / 'v.txt'}\n" in printed
    assert read_vocabulary(tmp_path / "v.txt") == [*SPECIAL, "|", "ö", "b", "ɔ̃"]


def test_every_transcript_is_spelled_by_its_vocabulary(tmp_path: Path) -> None:
    texts = [
        "Ünïcode tèxt, ẞ ﬁ",
        "İstanbul ılık",
        "किताब สวัสดี",
        "한국어 中文 👍🏽 a\u200db",
        "ẹ́ é 5 |▁ <unk>",
        "'-\" \0",
    ]
    manifest = write_transcripts(tmp_path, texts)
    for case in ("keep", "lower", "upper"):
        path = tmp_path / f"{case}.txt"
        printed = run(manifest, "-o", path, "--case", case)
        assert "left out (3 occurrences): '\\x00' (U+0000), '|', '▁'\n" in printed
        spelling = Transcripts(read_vocabulary(path))
        assert {symbol for text in texts for symbol in spelling.encode(text)[1]} == {"\0", "|", "▁"}


def test_rare_symbols_can_be_left_out(tmp_path: Path) -> None:
    manifest = write_transcripts(tmp_path, ["aab" * 10, "aq?"])
    printed = run(manifest, "--min-count", 2, "-o", tmp_path / "v.txt")
    assert "left out (2 occurrences): '?', 'q'\n" in printed and "q 1 3.030% u1\n" in printed
    assert read_vocabulary(tmp_path / "v.txt") == [*SPECIAL, "|", "a", "b"]
    assert "b 10 30.303%\n" in printed  # no example: it is not rare


def test_case_is_that_of_turkish_where_its_letters_occur(tmp_path: Path) -> None:
    turkish = write_transcripts(tmp_path / "tr", ["IŞIK İYİ", "ılık iyi"])
    assert count_symbols([turkish], case="lower").turkish and not count_symbols([turkish]).turkish
    assert {"ı", "i"} < {*count_symbols([turkish], case="lower").counts}
    assert {"I", "İ"} < {*count_symbols([turkish], case="upper").counts}
    other = count_symbols([write_transcripts(tmp_path / "de", ["Iß iss"])], case="upper")
    assert other.most_common() == [("I", 2), ("S", 2), ("ß", 1)] and other.examples == dict.fromkeys("ISß", "u0")


def test_phones_are_between_spaces(tmp_path: Path) -> None:
    manifest = write_transcripts(tmp_path, ["sil  dh ax sil", "ax <unk> sil"])
    printed = run(manifest, "--phones", "-o", tmp_path / "v.txt")
    assert "sil 3 42.857% u0\n" in printed and "left out (1 occurrence): '<unk>'\n" in printed
    assert f"objective.vocabulary={tmp_path / 'v.txt'} objective.split=spaces\n" in printed
    symbols = read_vocabulary(tmp_path / "v.txt")
    assert symbols == [*SPECIAL, "sil", "ax", "dh"]
    check_vocabulary(symbols, split="spaces")


def test_processes_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "CHUNK", 3)
    manifest = write_transcripts(tmp_path, [f"{n} ab" for n in range(20)])
    calls: list[tuple[int, int]] = []
    one = count_symbols([manifest], progress=lambda done, total: calls.append((done, total)))
    assert count_symbols([manifest], jobs=2) == one
    assert calls[0] == (3, 20) and calls[-1] == (20, 20)
    assert one.examples["9"] == "u9" and one.counts["1"] == 12


def test_errors(tmp_path: Path) -> None:
    manifest = write_transcripts(tmp_path, ["a"])
    (tmp_path / "there").touch()
    assert run(manifest, "-o", tmp_path / "there") == f"{tmp_path / 'there'}: exists; choose another name"
    assert run(manifest, "--case", "title") == "--case title: choose one of keep, lower, upper"
    silent = write_transcripts(tmp_path / "silent", ["", " "])
    assert run(silent) == f"{silent}: no transcripts"
    assert "no.jsonl: no such manifest" in run(tmp_path / "no.jsonl")
