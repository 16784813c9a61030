"""What other commands have written into the folder of a run is in its report: samples and evaluations."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.helpers.pages import report
from tests.helpers.run_folders import png, write_error_rates, write_run, write_samples, write_utterance
from w2vscale.analysis.report import samples


class TestSamples:
    """Pictures and sounds are in the page."""

    def test_those_of_the_newest_updates(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp")
        for update in (20, 40, 60, 80):
            folder = write_samples(exp, update)
        write_samples(exp, 80, "attention_layer_10")
        write_samples(exp, 80, "attention_layer_2")
        page = report(tmp_path, exp)
        assert [(one.text, "open" in one.attributes) for one in page.all("summary")][:3] == [
            ("update 80", False), ("update 60", False), ("update 40", False),
        ]  # fmt: skip
        assert ["open" in one.attributes for one in page.all("details")][:3] == [True, False, False]
        assert [one.attributes["alt"] for one in page.all("img")] == [
            "attention layer 2, update 80", "attention layer 10, update 80", "spectrogram, update 80",
            "spectrogram, update 60", "spectrogram, update 40",
        ]  # fmt: skip
        kind, _, content = (page.all("img")[2].attributes["src"] or "").partition(",")
        assert (kind, base64.b64decode(content)) == ("data:image/png;base64", png(64, 24))
        sound = page.all("audio")[2].attributes
        assert sound["aria-label"] == "spectrogram, update 80" and "controls" in sound
        content = (sound["src"] or "").removeprefix("data:audio/flac;base64,")
        assert base64.b64decode(content) == (folder / "spectrogram.flac").read_bytes()

    def test_other_files_and_large_ones_are_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_samples(write_run(tmp_path / "exp"), 80)
        (folder / "page.png").write_text("<svg onload=alert(1)>")
        (folder / "notes.txt").write_text("text")
        found, size, left_out = samples.read_samples(folder, 2**20)
        assert ([one.title for one in found], left_out) == (["spectrogram"], 0)
        assert samples.read_samples(folder, size - 1)[2] == 1
        monkeypatch.setattr(samples, "LARGEST", 100)
        assert samples.read_samples(folder, 2**20)[2] == 2
        page = report(tmp_path, tmp_path / "exp")
        assert f"2 more files are in {tmp_path / 'exp' / 'samples'}." in [one.text for one in page.all("p")]

    def test_the_parts_of_an_utterance_are_one_figure(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp", "ctc_1h")
        write_samples(exp, 80, "attention_block_04")
        for number in (10, 2):
            write_utterance(exp, 80, number, f"reference:  WORD <b>&amp; {number}\nhypothesis: \n")
        page = report(tmp_path, exp)
        figures = [one for one in page.all("figure") if "Utterance" in one.text or "utterance" in one.text]
        texts = [f"utterance {number}reference WORD <b>&amp; {number}hypothesis (nothing)" for number in (2, 10)]
        assert [one.text for one in figures] == texts
        labels = [one.attributes.get("alt") or one.attributes.get("aria-label") for one in page.elements]
        assert [label for label in labels if label and label.endswith("update 80") and "picture" not in label] == [
            "2 spectrogram, update 80", "2 audio, update 80", "10 spectrogram, update 80", "10 audio, update 80",
            "attention block 04, update 80", "attention block 04, update 80",
        ]  # fmt: skip

    def test_a_text_is_not_too_long(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp", "ctc_1h")
        write_utterance(exp, 80, 1, "reference:  " + "x" * 10_000)
        assert max(len(one.text) for one in report(tmp_path, exp).all("figure")) < 6000


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated in several ways."""
    exp = write_run(tmp_path_factory.mktemp("rates") / "exp", "ctc_1h", updates=20)
    texts = [("a b c d e f", "a x c e f g"), ("one two", "one two"), ("one", "")]
    write_error_rates(exp / "wer_test.json", texts)
    write_error_rates(exp / "decoded" / "wer_beam.json", texts[1:2], speaker="bob")
    write_error_rates(exp / "a" / "b" / "deep.json", texts)
    (exp / "evaluation.json").write_text(json.dumps({"update": 20, "utterances": 3.0, "table": {"loss": "1.5 nats"}}))
    (exp / "other.json").write_text("[1]")
    return exp


class TestErrorRates:
    """What `evaluate` has written is in the page."""

    def test_the_tables(self, decoded: Path, tmp_path: Path) -> None:
        page = report(tmp_path, decoded)
        rows = page.rows("error rates")
        assert [row[0:4] for row in rows[1:]] == [
            ["exp", "test-clean", "greedy", "44.4% (0.0% to 100.0%)"],
            ["exp", "test-clean", "greedy", "0.0% (0.0% to 0.0%)"],
        ]
        assert rows[1][5:] == ["1 / 2 / 1", "3"]
        assert ["loss", "1.5 nats"] in page.rows("evaluations")
        assert page.rows("speakers, exp on test-clean, greedy: speakers and worst utterances")[1][:3] == [
            "ann",
            "9",
            "44.4%",
        ]

    def test_alignments(self, decoded: Path, tmp_path: Path) -> None:
        page = report(tmp_path, decoded)
        first, second = page.all("p", dir="auto")
        assert [one.text for one in page.all("p", class_="name")] == ["u2, speaker ann: 100%", "u0, speaker ann: 50%"]
        assert first.text == "one ∗ D"
        assert second.text == "a b x S c d ∗ D e f ∗ g I"
        pairs = [one.attributes["class"] for one in page.all("span", class_="pair")]
        assert {"pair", "pair S", "pair D", "pair I"} == set(pairs)

    def test_a_file_of_an_earlier_version(self, decoded: Path, tmp_path: Path) -> None:
        old = write_run(tmp_path / "old", "ctc_1h", updates=20)
        document = json.loads((decoded / "wer_test.json").read_text())
        kept = ("utterance", "words", "characters")
        document["utterances"] = [{key: one[key] for key in kept} for one in document["utterances"]]
        for key in ("words", "characters", "speakers", "bad"):
            del document[key]
        (old / "wer.json").write_text(json.dumps(document))
        page = report(tmp_path, old)
        assert page.rows("error rates")[1][3] == "44.4% (0.0% to 100.0%)"
        assert [one.text for one in page.all("p", class_="name")] == ["u2: 100%", "u0: 50%"]
