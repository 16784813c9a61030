"""The report of `data prepare`: what stops the command, its rows, and its JSON, also of a command that is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import faults
from tests.helpers.audio import noise, write_audio, write_text
from tests.helpers.commands import error_of
from w2vscale.cli.app import app
from w2vscale.corpora.finding import TRANSCRIPT, Unusable
from w2vscale.corpora.report import ALWAYS_ALLOWED, SHOWN, Report
from w2vscale.errors import UserError

suffixes = st.sampled_from(["", ".wav", ".FLAC", ".txt", ".pdf", ".m4a", ".json", *(f".{n}" for n in range(20))])
reports = st.builds(
    Report,
    used=st.dictionaries(suffixes, st.integers(1, 10**7)).map(Counter),
    unit=st.sampled_from(["file", "utterance"]),
    unusable=st.lists(
        st.builds(
            Unusable,
            suffixes.map("a/b{}".format),
            st.sampled_from("xyz"),
            st.text(min_size=1),
            units=st.integers(1, 10**4),
        )
    ),
    others=st.dictionaries(
        st.tuples(suffixes, st.sampled_from([TRANSCRIPT, "not audio", "hidden"])), st.integers(1, 10**7), max_size=40
    ).map(Counter),
)


@given(report=reports)
def test_every_file_is_in_one_row(report: Report) -> None:
    rows = report.rows()
    unusable = {(one.path, one.kind) for one in report.unusable}
    total = report.used.total() + len(unusable) + report.others.total()
    assert sum(count for _, count, _ in rows) == total
    assert len([row for row in rows if row[2] == "used"]) == len(report.used)
    assert len(rows) <= len(report.used) + len(
        {(Path(one.path).suffix.lower(), one.kind) for one in report.unusable}
    ) + SHOWN + len({reason for _, reason in report.others})
    assert report.incomplete == (bool(report.unusable) or any(reason != TRANSCRIPT for _, reason in report.others))


@given(
    units=st.lists(st.integers(1, 100), max_size=100), used=st.integers(1, 3000), fraction=st.floats(0, 1),
    strict=st.booleans(),
)  # fmt: skip
def test_what_is_refused(units: list[int], used: int, fraction: float, strict: bool) -> None:
    report = Report(unusable=[Unusable(f"{number}.wav", "k", "broken", lost) for number, lost in enumerate(units)])
    bad = sum(units)
    refused = bad > 0 and (strict or (bad > ALWAYS_ALLOWED and bad > fraction * (bad + used)))
    message = ""
    try:
        report.check(Path("/corpus"), used, strict=strict, limit=fraction)
    except UserError as error:
        message = str(error)
    assert bool(message) == refused
    if refused:
        assert message.startswith("/corpus/0.wav: broken")
        assert ("without --strict" in message) == strict


class TestCommand:
    @pytest.fixture
    def audio(self, tmp_path: Path) -> Path:
        """Nine good files, one that is broken, one whose transcript is, and files that are no audio."""
        folder = tmp_path / "audio"
        for number in range(10):
            write_audio(folder / f"{number}.wav", noise(1.0, seed=number)).with_suffix(".txt").write_text("A")
        (folder / "3.txt").write_bytes(b"\xe4\xff")
        write_text(folder / "broken [1].flac")
        write_text(folder / "notes.pdf")
        write_text(folder / "._1.wav")
        return folder

    def report(self, out: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((out / "prepare_report.json").read_text())
        return found

    def test_what_it_says_and_what_is_printed(self, audio: Path, tmp_path: Path, run: Callable[..., str]) -> None:
        out = tmp_path / "out"
        printed = run("data", "prepare", "folder", audio, out)
        found = self.report(out)
        (manifest,) = found["manifests"]
        assert (manifest["path"], manifest["utterances"]) == (str(out / "cuts_train.jsonl"), 9)
        assert manifest["hours"] == pytest.approx(9 / 3600)
        assert found["used"] == {".wav": 9}
        assert [(one["path"], one["kind"]) for one in found["unusable"]] == [
            ("broken [1].flac", "undecodable"), ("3.wav", "transcript")
        ]  # fmt: skip
        assert {(one["suffix"], one["reason"], one["files"]) for one in found["other_files"]} == {
            (".txt", "transcript", 9), (".txt", "its audio file is left out", 1),
            (".pdf", "not audio", 1), (".wav", "hidden", 1),
        }  # fmt: skip
        assert found["left_out"] == [{"path": "._1.wav", "reason": "hidden"}]
        assert found["notes"] == {} and "speech" not in found
        rows = [" ".join(line.split()) for line in printed.splitlines()]
        assert rows[0] == f"{out / 'cuts_train.jsonl'}: 9 utterances, 0.00 hours"
        for row in (
            ".wav 9 used", ".txt 9 transcript", ".txt 1 its audio file is left out", ".pdf 1 not audio",
            ".wav 1 hidden",
            ".flac 1 left out: broken [1].flac: not readable as audio: Format not recognised",
        ):  # fmt: skip
            assert row in rows
        assert any(row.startswith(".wav 1 left out: 3.wav: 3.txt: line 1 is not UTF-8") for row in rows)
        assert rows[-1] == f"details, with the paths of unusable files: {out / 'prepare_report.json'}"

    def test_a_list_counts_utterances(self, audio: Path, tmp_path: Path, run: Callable[..., str]) -> None:
        lines = [{"audio_filepath": f"audio/{1 + n % 4}.wav", "offset": n / 1000, "duration": 0.1} for n in range(300)]
        lines += [{"audio_filepath": f"audio/{name}.wav"} for name in ["gone"] * 10 + ["lost"]]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps({**line, "text": "a"}) + "\n" for line in lines))
        printed = run("data", "prepare", "manifest", tmp_path / "m.jsonl", tmp_path / "out")
        rows = [" ".join(line.split()) for line in printed.splitlines()]
        assert ".wav 4 used" in rows
        assert ".wav 2 11 utterances left out: audio/gone.wav: no such file" in rows
        found = self.report(tmp_path / "out")
        assert [(one["path"], one["utterances"]) for one in found["unusable"]] == [
            ("audio/gone.wav", 10), ("audio/lost.wav", 1)
        ]  # fmt: skip

    def test_the_limit_of_a_list_counts_the_utterances_of_a_file_that_is_lost(
        self, audio: Path, tmp_path: Path
    ) -> None:
        lines = [{"audio_filepath": "gone.wav"}] * 20 + [{"audio_filepath": f"audio/{n}.wav"} for n in range(10)]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ("data", "prepare", "manifest", tmp_path / "m.jsonl", tmp_path / "out")
        assert error_of(*command) == (
            f"{tmp_path / 'gone.wav'}: no such file (and 19 more of 30 utterances): that is 66.7%, above "
            "--max-bad-fraction 0.05"
        )
        assert error_of(*command, "--strict").endswith("without --strict, such utterances are left out")
        app(args=[str(one) for one in (*command, "--max-bad-fraction", 0.67)], standalone_mode=False)

    def test_a_folder_that_is_used_whole_needs_no_table(self, tmp_path: Path, run: Callable[..., str]) -> None:
        write_audio(tmp_path / "audio" / "a.wav", noise(1.0)).with_suffix(".txt").write_text("A")
        printed = run("data", "prepare", "folder", tmp_path / "audio", tmp_path)
        assert printed == f"{tmp_path / 'cuts_train.jsonl'}: 1 utterance, 0.00 hours\n"
        assert self.report(tmp_path)["unusable"] == []

    @pytest.mark.parametrize("first", ["broken [1].flac", "3.wav"])
    def test_strict_stops_at_a_file_or_a_transcript(self, first: str, audio: Path, tmp_path: Path) -> None:
        if first == "3.wav":
            (audio / "broken [1].flac").unlink()
        message = error_of("data", "prepare", "folder", audio, tmp_path / "out", "--strict")
        assert message.startswith(f"{audio / first}: ") and message.endswith(
            "; without --strict, such files are left out"
        )
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"headers.sqlite", "prepare_report.json"}
        assert [one["path"] for one in self.report(tmp_path / "out")["unusable"]] == [first]

    def test_strict_takes_a_folder_with_other_files(self, audio: Path, tmp_path: Path, run: Callable[..., str]) -> None:
        (audio / "broken [1].flac").unlink()
        (audio / "3.txt").unlink()
        assert "10 utterances" in run("data", "prepare", "folder", audio, tmp_path / "out", "--strict")

    def test_a_manifest_of_an_earlier_call_stays_if_a_later_one_is_refused(
        self, audio: Path, tmp_path: Path, run: Callable[..., str]
    ) -> None:
        run("data", "prepare", "folder", audio, tmp_path)
        before = (tmp_path / "cuts_train.jsonl").read_bytes()
        for number in range(ALWAYS_ALLOWED):
            (audio / f"{number}.txt").write_bytes(b"\xe4\xff")
        message = error_of("data", "prepare", "folder", audio, tmp_path, "--max-bad-fraction", 0.5)
        assert message.endswith("(and 10 more of 11 files); no usable file is left")
        assert (tmp_path / "cuts_train.jsonl").read_bytes() == before
        found = self.report(tmp_path)
        assert len(found["unusable"]) == 11 and found["manifests"] == []

    @pytest.mark.parametrize(("fraction", "refused"), [(0.5, True), (0.55, True), (0.56, False), (1, False)])
    def test_transcripts_count_as_well(self, fraction: float, refused: bool, audio: Path, tmp_path: Path) -> None:
        for number in range(10, 18):
            write_audio(audio / f"{number}.wav", noise(0.5, seed=number))
        for number in range(9):
            (audio / f"{number}.txt").write_bytes(b"\xe4\xff")
        write_text(audio / "broken too.flac")
        command = ("data", "prepare", "folder", audio, tmp_path / "out", "--max-bad-fraction", fraction)
        if fraction == 0.5:
            assert error_of(*command).endswith("(and 10 more of 20 files): that is 55.0%, above --max-bad-fraction 0.5")
        else:
            app(args=[str(argument) for argument in command], standalone_mode=False)
        assert len(self.report(tmp_path / "out")["unusable"]) == 11

    def test_the_report_of_a_share_that_leaves_nothing(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "a.wav", noise(1.0))
        write_text(tmp_path / "audio" / "b.wav")
        message = error_of("data", "prepare", "folder", tmp_path / "audio", tmp_path, "--validation-share", 0.5)
        assert message.startswith("--validation-share 0.5: leaves no recording for training")
        assert [one["path"] for one in self.report(tmp_path)["unusable"]] == ["b.wav"]
        assert not [*tmp_path.glob("*cuts*")]

    def test_no_speech_in_any_file(self, tmp_path: Path) -> None:
        pytest.importorskip("silero_vad", reason="silero-vad is not installed: pip install 'w2vscale[vad]'")
        write_audio(tmp_path / "audio" / "a.wav", np.zeros(48_000, np.float32))
        message = error_of("data", "prepare", "folder", tmp_path / "audio", tmp_path, "--vad")
        assert message == f"{tmp_path / 'audio'}: no speech was found in any of the files"
        assert self.report(tmp_path)["other_files"] == [
            {"suffix": ".wav", "reason": "no speech was found in it", "files": 1}
        ]
        assert not [*tmp_path.glob("*cuts*")]

    @pytest.mark.parametrize("fraction", ["-0.1", "1.1", "x", "nan"])
    def test_a_fraction_out_of_range(
        self, fraction: str, audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        found = faults.run("data", "prepare", "folder", audio, tmp_path / "out", "--max-bad-fraction", fraction)
        assert found.refused and "--max-bad-fraction" in found.errors
        assert found.new_files == []
