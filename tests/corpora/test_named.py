"""Corpora by name: parts, transcripts, speakers and languages, damaged and missing files, and user errors."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lhotse.cut import Cut

from tests.corpora.test_folder import cuts_of, error_of
from tests.helpers.audio import noise, write_audio, write_text
from tests.helpers.trained import trains
from w2vscale.corpora.index import build_index
from w2vscale.corpora.listing import EMPTY_TEXT, SPEECH_AFTER_AUDIO
from w2vscale.corpora.named import (
    WITHOUT_ROW,
    WITHOUT_TRANSCRIPT,
    prepare_aishell,
    prepare_commonvoice,
    prepare_gigaspeech,
    prepare_librilight,
    prepare_librispeech,
    prepare_mls,
    prepare_peoples_speech,
    prepare_voxpopuli,
)
from w2vscale.corpora.preparing import NO_SPEECH, Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.validate import validate_manifest


def write_librispeech(root: Path, parts: tuple[str, ...]) -> Path:
    """Two speakers a part, two utterances each, as LibriSpeech is laid out."""
    for first, part in enumerate(parts, start=1):
        for speaker in (10 * first, 10 * first + 1):
            folder = root / "LibriSpeech" / part / str(speaker) / "7"
            names = [f"{speaker}-7-{number:04d}" for number in range(2)]
            for number, name in enumerate(names):
                write_audio(folder / f"{name}.flac", noise(1.5 + number, seed=speaker + number))
            text = "".join(f"{name} WORDS OF {number}\n" for number, name in enumerate(names))
            (folder / f"{speaker}-7.trans.txt").write_text(text)
    return root / "LibriSpeech"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_librispeech(tmp_path_factory.mktemp("corpus"), ("train-clean-5", "dev-clean-2", "test-other"))


class TestLibriSpeech:
    def test_each_part_is_a_manifest_of_its_utterances(self, corpus: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(corpus, tmp_path / "new" / "folder").manifests
        assert {manifest.path.name for manifest in written} == {
            "cuts_train-clean-5.jsonl",
            "cuts_dev-clean-2.jsonl",
            "cuts_test-other.jsonl",
        }
        assert {manifest.utterances for manifest in written} == {4}
        for manifest in written:
            assert manifest.hours == pytest.approx(8.0 / 3600)
            cuts = cuts_of(manifest)
            assert list(cuts) == sorted(cuts)
            assert validate_manifest(manifest.path).bad == 0

    def test_transcripts_and_speakers_are_kept(self, corpus: Path, tmp_path: Path) -> None:
        (written,) = prepare_librispeech(corpus, tmp_path, parts=["dev-clean-2"]).manifests
        cut = cuts_of(written)["20-7-0001"]
        assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("WORDS OF 1", "20")
        assert (cut.sampling_rate, cut.duration) == (16_000, 2.5)

    def test_mini_takes_its_two_parts_only(self, corpus: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(corpus, tmp_path, mini=True).manifests
        assert [manifest.path.name for manifest in written] == ["cuts_dev-clean-2.jsonl", "cuts_train-clean-5.jsonl"]

    def test_the_root_logger_keeps_its_level(
        self, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            prepare_librispeech(corpus, tmp_path, parts=["test-other"])
            assert logging.getLogger().level == logging.INFO

    def test_the_folder_above_librispeech_will_do(self, corpus: Path, tmp_path: Path) -> None:
        (written,) = prepare_librispeech(corpus.parent, tmp_path, parts=["test-other"]).manifests
        assert written.utterances == 4

    def test_several_jobs_write_the_same(self, corpus: Path, tmp_path: Path) -> None:
        found = [
            prepare_librispeech(
                corpus, tmp_path / str(jobs), parts=["test-other"], options=Options(jobs=jobs)
            ).manifests[0]
            for jobs in (1, 2)
        ]
        assert found[0].path.read_bytes() == found[1].path.read_bytes()

    def test_a_missing_folder_and_an_unknown_or_absent_part_are_named(self, corpus: Path, tmp_path: Path) -> None:
        assert error_of(prepare_librispeech, tmp_path / "no", tmp_path) == f"{tmp_path / 'no'}: no such folder"
        assert "--part train-clean-7: not a part" in error_of(
            prepare_librispeech, corpus, tmp_path, parts=["train-clean-7"]
        )
        assert error_of(prepare_librispeech, corpus, tmp_path, parts=["dev-other"]) == (
            f"{corpus / 'dev-other'}: no such folder"
        )
        assert "not a part" in error_of(prepare_librispeech, corpus, tmp_path, parts=["test-other"], mini=True)

    def test_a_folder_without_any_part_says_what_was_looked_for(self, tmp_path: Path) -> None:
        message = error_of(prepare_librispeech, tmp_path, tmp_path / "out", mini=True)
        assert message == f"{tmp_path}: contains no part of the corpus (looked for dev-clean-2, train-clean-5)"

    def test_a_part_without_utterances_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "dev-clean-2").mkdir()
        message = error_of(prepare_librispeech, tmp_path, tmp_path / "out")
        assert message.startswith(f"{tmp_path}: no usable utterance with a transcript in dev-clean-2: ")

    def test_the_error_of_a_part_is_not_that_of_another(self, tmp_path: Path) -> None:
        corpus = write_librispeech(tmp_path, ("dev-clean-2",))
        (corpus / "dev-clean-2" / "10" / "7" / "10-7-0000.flac").unlink()
        (corpus / "test-other").mkdir()
        message = error_of(prepare_librispeech, corpus, tmp_path / "out", parts=["dev-clean-2", "test-other"])
        assert "in test-other: " in message and "no such file" not in message

    def test_damaged_and_missing_files_do_not_end_it(self, tmp_path: Path) -> None:
        corpus = write_librispeech(tmp_path, ("dev-clean-2",))
        folder = corpus / "dev-clean-2" / "10" / "7"
        write_text(folder / "10-7-0001.flac")
        (folder / "10-7-0000.flac").unlink()
        report = prepare_librispeech(corpus, tmp_path / "out")
        assert report.manifests[0].utterances == 2
        assert {Path(one.path).name: one.reason for one in report.unusable} == {
            "10-7-0000.flac": "no such file, but it has a transcript",
            "10-7-0001.flac": "not readable as audio: Format not recognised",
        }
        strict = Options(strict=True)
        assert "without --strict" in error_of(prepare_librispeech, corpus, tmp_path / "out", options=strict)

    def test_an_output_that_cannot_be_written_is_named(self, corpus: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        message = error_of(prepare_librispeech, corpus, blocked, parts=["test-other"])
        assert message.startswith(f"{blocked / 'cuts_test-other.jsonl'}: cannot be written: ")

    def test_real_speech_gives_its_published_counts(self, shared_data: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(shared_data / "LibriSpeech", tmp_path, mini=True).manifests
        found = {manifest.path.stem: (manifest.utterances, round(60 * manifest.hours, 1)) for manifest in written}
        assert found == {"cuts_train-clean-5": (150, 31.0), "cuts_dev-clean-2": (58, 11.7)}
        assert all(cut.supervisions[0].text for cut in cuts_of(written[0]).values())


def report_of(prepare: Callable[..., Report], corpus: Path, output: Path, **options: Any) -> dict[str, dict[str, Cut]]:
    """What `prepare` writes: the cuts of each manifest, by the end of its name. All pass validation."""
    report = prepare(corpus, output, **options)
    assert report.unusable == []
    for manifest in report.manifests:
        build_index(manifest.path)
        assert validate_manifest(manifest.path, audio=True).bad == 0
    return {one.path.stem.removeprefix("cuts_"): cuts_of(one) for one in report.manifests}


def said(cut: Cut) -> tuple[str | None, str | None, str | None]:
    (supervision,) = cut.supervisions
    assert supervision.start == 0.0 and supervision.duration == cut.duration
    return supervision.text, supervision.speaker, supervision.language


class TestLibriLight:
    @pytest.fixture
    def corpus(self, tmp_path: Path) -> Path:
        folder = tmp_path / "librilight" / "small" / "12" / "a_book_with_flac_in_its_name"
        write_audio(folder / "one_64kb.flac", noise(40.0))
        speech = [[0.5, 9.0], [9.4, 14.0], [20.0, 20.4], [25.0, 39.0]]
        (folder / "one_64kb.json").write_text(json.dumps({"speaker": "12", "voice_activity": speech}))
        return tmp_path / "librilight"

    def test_recordings_are_cut_at_the_pauses_that_are_listed(self, corpus: Path, tmp_path: Path) -> None:
        found = report_of(prepare_librilight, corpus, tmp_path / "out", segment_seconds=10.0)
        name = "small-12-a_book_with_flac_in_its_name-one_64kb"
        times = {cut.id: (round(cut.start, 3), round(cut.end, 3)) for cut in found["small"].values()}
        assert times == {
            f"{name}-0": (0.5, 9.2),
            f"{name}-1": (9.2, 14.0),
            f"{name}-2": (19.2, 21.2),
            f"{name}-3": (25.0, 35.0),
            f"{name}-4": (35.0, 39.0),
        }
        assert {said(cut) for cut in found["small"].values()} == {(None, "12", "English")}

    def test_a_recording_without_its_list_is_named(self, corpus: Path, tmp_path: Path) -> None:
        other = write_audio(corpus / "small" / "13" / "book" / "two.flac", noise(3.0))
        report = prepare_librilight(corpus, tmp_path / "out")
        assert report.manifests[0].utterances == 3
        (one,) = report.unusable
        assert one.path == "small/13/book/two.flac" and one.reason.startswith(
            "its speech is not listed in two.json: cannot be"
        )
        other.with_suffix(".json").write_text('{"voice_activity": [[0]]}')
        (corpus / "small" / "13" / "gone.flac").symlink_to("absent")
        report = prepare_librilight(corpus, tmp_path / "out")
        assert len(report.unusable) == 1 and report.left_out == [("small/13/gone.flac", "broken link")]
        assert report.others[".flac", "broken link"] == 1
        other.with_suffix(".json").write_text('{"voice_activity": [[2, 3], [0, 1]]}')
        (one,) = prepare_librilight(corpus, tmp_path / "out").unusable
        assert one.reason == "its speech is not listed in two.json: its times are not in order"
        for seconds in (3.0, float("nan")):
            message = error_of(prepare_librilight, corpus, tmp_path / "out", segment_seconds=seconds)
            assert message.startswith(f"--segment-seconds {seconds}: must be at least 4.0 where")

    def test_recordings_without_speech_are_left_out_and_counted(self, corpus: Path, tmp_path: Path) -> None:
        silent = write_audio(corpus / "small" / "13" / "book" / "two.flac", noise(3.0))
        silent.with_suffix(".json").write_text('{"voice_activity": []}')
        write_text(silent.with_suffix(".txt"))
        report = prepare_librilight(corpus, tmp_path / "out")
        assert report.used == {".flac": 1} and report.unusable == []
        assert report.left_out == [("small/13/book/two.flac", NO_SPEECH)]
        assert report.others == {(".flac", NO_SPEECH): 1, (".txt", "not used with Libri-Light"): 1}
        silent.with_suffix(".json").write_text('{"voice_activity": [[1, 2], [2.5, 3.2]]}')
        report = prepare_librilight(corpus, tmp_path / "out")
        assert report.used == {".flac": 2} and +report.notes == {SPEECH_AFTER_AUDIO: 1}
        silent.with_suffix(".json").write_text('{"voice_activity": []}')
        shutil.rmtree(corpus / "small" / "12")
        message = error_of(prepare_librilight, corpus, tmp_path / "out")
        assert message == f"{corpus}: no speech was found in any of the files"


class TestMls:
    def write(self, root: Path, language: str, suffix: str = ".opus") -> Path:
        folder = root / f"mls_{language}{'_opus' if suffix == '.opus' else ''}"
        for part in ("train", "dev", "test"):
            for number in range(2):
                name = f"7_8_{len(part)}{number:05d}"
                write_audio(folder / part / "audio" / "7" / "8" / f"{name}{suffix}", noise(1.5, seed=number))
            lines = (f"7_8_{len(part)}{number:05d}\tzwei töne {number}\n" for number in range(2))
            (folder / part / "transcripts.txt").write_text("".join(lines), encoding="utf-8")
        return folder

    def test_languages_and_parts(self, tmp_path: Path) -> None:
        self.write(tmp_path, "german")
        self.write(tmp_path, "polish", ".flac")
        found = report_of(prepare_mls, tmp_path, tmp_path / "out")
        parts = ("train", "dev", "test")
        assert list(found) == [f"{language}_{part}" for language in ("german", "polish") for part in parts]
        assert said(found["german_dev"]["7_8_300001"]) == ("zwei töne 1", "7", "german")

    def test_one_part_of_the_folder_of_a_language(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "dutch")
        assert list(report_of(prepare_mls, folder, tmp_path / "out", parts=["dutch_dev"])) == ["dutch_dev"]
        message = error_of(prepare_mls, folder, tmp_path / "out", parts=["dev"])
        assert message == "--part dev: not a part of the corpus; choose from dutch_train, dutch_dev, dutch_test"

    def test_missing_audio_and_a_line_of_another_form(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "french")
        (folder / "dev" / "audio" / "7" / "8" / "7_8_300000.opus").unlink()
        report = prepare_mls(folder, tmp_path / "out")
        assert [(Path(one.path).name, one.reason) for one in report.unusable] == [("7_8_300000.opus", "no such file")]
        assert [one.utterances for one in report.manifests] == [2, 1, 2]
        transcripts = folder / "dev" / "transcripts.txt"
        transcripts.write_text("7_8_300000 no tab\n")
        report = prepare_mls(folder, tmp_path / "out")
        reason = "line 1 is not: SPEAKER_BOOK_NUMBER, a tab, and the text"
        assert [(one.path, one.reason) for one in report.unusable] == [(str(transcripts), reason)]
        assert error_of(prepare_mls, folder, tmp_path / "out", parts=["french_dev"]).endswith(f": {reason}")

    def test_empty_transcripts_blank_lines_and_audio_without_a_line(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "french")
        (folder / "dev" / "transcripts.txt").write_text("7_8_300000\t\r\n\n")
        report = prepare_mls(folder, tmp_path / "out", parts=["french_dev"])
        assert said(cuts_of(report.manifests[0])["7_8_300000"]) == ("", "7", "french")
        assert report.unusable == [] and +report.notes == {EMPTY_TEXT: 1, WITHOUT_TRANSCRIPT: 1}


class TestCommonVoice:
    HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment\n"

    def write(self, folder: Path) -> Path:
        for number, part in enumerate(("train", "dev", "test", "validated")):
            name = f"common_voice_sv_{min(number, 2)}.mp3"
            write_audio(folder / "clips" / name, noise(1.5, seed=number))
            row = f'abc{number}\t{name}\tEn "mening{number}\u2028\t2\t0\t\t\t\t\tsv-SE\t\n'
            (folder / f"{part}.tsv").write_text(self.HEADER + row, encoding="utf-8")
        return folder

    def test_train_dev_and_test_of_a_language(self, tmp_path: Path) -> None:
        self.write(tmp_path / "cv" / "sv-SE")
        for corpus in (tmp_path / "cv", tmp_path / "cv" / "sv-SE"):
            found = report_of(prepare_commonvoice, corpus, tmp_path / "out")
            assert sorted(found) == ["sv-SE_dev", "sv-SE_test", "sv-SE_train"]
            assert said(found["sv-SE_dev"]["common_voice_sv_1"]) == ('En "mening1', "abc1", "sv-SE")
        trains(tmp_path / "out" / "cuts_sv-SE_train.jsonl", tmp_path / "exp")

    def test_other_tables(self, tmp_path: Path) -> None:
        corpus = self.write(tmp_path / "sv-SE")
        assert list(report_of(prepare_commonvoice, corpus, tmp_path / "out", parts=["validated"])) == [
            "sv-SE_validated"
        ]
        (corpus / "clip_durations.tsv").write_text("clip\tduration\na.mp3\t3\n")
        message = error_of(prepare_commonvoice, corpus, tmp_path / "out", parts=["clip_durations"])
        assert message == f"{corpus / 'clip_durations.tsv'}: has no columns path and sentence"
        for parts in (["nothing"], ["train", "nothing"]):
            assert "--part nothing: not a part" in error_of(prepare_commonvoice, corpus, tmp_path, parts=parts)

    def test_rows_that_end_early(self, tmp_path: Path) -> None:
        corpus = self.write(tmp_path / "sv-SE")
        with (corpus / "train.tsv").open("a") as file:
            file.write("abc9\tcommon_voice_sv_0.mp3\nabc9\t\tord\n")
        report = prepare_commonvoice(corpus, tmp_path / "out", parts=["train"])
        assert [one.reason for one in report.unusable] == [
            "line 3 has no path or no sentence",
            "line 4 has no path or no sentence",
        ]
        assert report.manifests[0].utterances == 1

    def test_empty_columns_long_fields_and_too_many_columns(self, tmp_path: Path) -> None:
        corpus = self.write(tmp_path / "sv-SE")
        name = "common_voice_sv_1.mp3"
        with (corpus / "train.tsv").open("a") as file:
            file.write(f"\t{name}\t{'ord ' * 40_000}\t2\t0\t\t\t\t\tsv-SE\t\n\n")
            file.write(f"abc\t{name}\tett\tord\t2\t0\t\t\t\t\tsv-SE\t\n")
        report = prepare_commonvoice(corpus, tmp_path / "out", parts=["train"])
        text, speaker, language = said(cuts_of(report.manifests[0])["common_voice_sv_1"])
        assert text is not None and len(text) == 159_999 and (speaker, language) == (None, "sv-SE")
        assert [one.reason for one in report.unusable] == ["line 5 has more than 11 columns"]

    def test_clips_that_no_table_names_are_counted(self, tmp_path: Path) -> None:
        corpus = self.write(tmp_path / "sv-SE")
        write_audio(corpus / "clips" / "another.mp3", noise(1.0))
        assert +prepare_commonvoice(corpus, tmp_path / "out", parts=["train"]).notes == {WITHOUT_ROW: 1}
        (corpus / "other.tsv").write_text("client_id\tpath\nabc\tanother.mp3\n")
        (corpus / "reported.tsv").write_bytes(b"\xe4\n")
        (note,) = +prepare_commonvoice(corpus, tmp_path / "out", parts=["train"]).notes
        assert note.startswith(f"table of clips cannot be read: {corpus / 'reported.tsv'}: line 1 is not UTF-8")


class TestVoxPopuli:
    HEADER = "session_id|id_|original_text|normed_text|speaker_id|gender|split|start_time|end_time\n"

    def test_segments_of_sessions(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "raw_audios" / "hr" / "2019" / "20190115-PLENARY_hr.ogg", noise(12.0))
        rows = [
            f"20190115-PLENARY|x{n}|Riječ {n}.|riječ {n}|99|male|{part}|{start}|{start + 2}\n"
            for n, (part, start) in enumerate((("train", 0.5), ("train", 3.25), ("dev", 6.0), ("test", 9.0)))
        ]
        message = error_of(prepare_voxpopuli, tmp_path, tmp_path / "out", language="hr")
        assert "has no asr_hr.tsv.gz: get it from https://" in message and "--language hr" in message
        with gzip.open(tmp_path / "asr_hr.tsv.gz", "wt", encoding="utf-8") as file:
            file.write(self.HEADER + "".join(rows))
        found = report_of(prepare_voxpopuli, tmp_path, tmp_path / "out", language="hr")
        assert list(found) == ["hr_train", "hr_dev", "hr_test"]
        second = found["hr_train"]["20190115-PLENARY-2"]
        assert (second.start, second.duration, *said(second)) == (3.25, 2.0, "riječ 1", "99", "hr")
        assert "--language xx: choose one of en, " in error_of(
            prepare_voxpopuli, tmp_path, tmp_path / "out", language="xx"
        )


class TestGigaSpeech:
    def test_segments_of_a_part(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "podcast" / "P0000" / "POD0000000001.opus", noise(10.0))
        segments = [
            {"sid": f"POD0000000001_S{n}", "speaker": "N/A", "begin_time": 2.5 * n, "end_time": 2.5 * n + 2.0,
             "text_tn": f"WORDS <COMMA> {n}", "subsets": ["{XS}"]}
            for n in range(3)
        ]  # fmt: skip
        audio = {"aid": "POD0000000001", "path": "audio/podcast/P0000/POD0000000001.opus", "duration": 10.0,
                 "sample_rate": 16000, "channels": 1, "subsets": ["{XS}"], "segments": segments}  # fmt: skip
        (tmp_path / "GigaSpeech.json").write_text(json.dumps({"dataset": "GigaSpeech", "audios": [audio]}))
        found = report_of(prepare_gigaspeech, tmp_path, tmp_path / "out", parts=["XS"])
        assert [(cut.start, cut.duration) for cut in found["XS"].values()] == [(0.0, 2.0), (2.5, 2.0), (5.0, 2.0)]
        assert said(found["XS"]["POD0000000001_S2"])[0] == "WORDS <COMMA> 2"
        assert "--part XXL: not a part" in error_of(prepare_gigaspeech, tmp_path, tmp_path, parts=["XXL"])
        assert error_of(prepare_gigaspeech, tmp_path / "audio", tmp_path).endswith("has no GigaSpeech.json")

    def test_an_entry_without_its_subsets(self, tmp_path: Path) -> None:
        (tmp_path / "GigaSpeech.json").write_text('{"audios": [{"aid": "x"}]}')
        message = error_of(prepare_gigaspeech, tmp_path, tmp_path / "out")
        assert message == f"{tmp_path}: no usable utterance with a transcript in XL: an entry has no 'subsets'"


class TestPeoplesSpeech:
    def test_a_part_that_is_there(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "train" / "clean" / "a_DOT_mp3" / "a_00000.flac", noise(1.5))
        data = {"duration_ms": [1500], "label": ["some words"], "name": ["a_DOT_mp3/a_00000.flac"]}
        (tmp_path / "train" / "clean.json").write_text(json.dumps({"identifier": "a", "training_data": data}) + "\n")
        found = report_of(prepare_peoples_speech, tmp_path, tmp_path / "out")
        assert said(found["clean"]["a_00000"]) == ("some words", None, "English")
        assert error_of(prepare_peoples_speech, tmp_path, tmp_path / "out", parts=["dirty"]).startswith(
            f"{tmp_path / 'dirty'}: no such folder"
        )


class TestAishell:
    def test_parts_and_audio_without_a_transcript(self, tmp_path: Path) -> None:
        data = tmp_path / "aishell" / "data_aishell"
        for number, part in enumerate(("train", "dev", "test")):
            write_audio(data / "wav" / part / "S0002" / f"BAC009S0002W012{number}.wav", noise(1.5, seed=number))
        write_audio(data / "wav" / "dev" / "S0002" / "BAC009S0002W0999.wav", noise(1.5))
        (data / "transcript").mkdir()
        lines = "".join(f"BAC009S0002W012{number} 而 对 楼市 {number}\n" for number in range(3))
        (data / "transcript" / "aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")
        found = report_of(prepare_aishell, tmp_path, tmp_path / "out")
        assert list(found) == ["train", "dev", "test"]
        assert said(found["dev"]["BAC009S0002W0121"]) == ("而对楼市1", "S0002", "Chinese")
        assert +prepare_aishell(tmp_path, tmp_path / "out").notes == {WITHOUT_TRANSCRIPT: 1}
        (data / "transcript" / "aishell_transcript_v0.8.txt").unlink()
        message = error_of(prepare_aishell, tmp_path, tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'aishell'}: no usable utterance with a transcript in train: ")
