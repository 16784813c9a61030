"""Manifests of any folder of audio: formats, segments, held-out recordings, repeated and killed calls, user errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import Cut

from tests.helpers.audio import noise, write_audio, write_text
from w2vscale.corpora.folder import SAME_NAME, prepare_folder
from w2vscale.corpora.header_cache import HeaderCache
from w2vscale.corpora.index import build_index
from w2vscale.corpora.manifests import PreparedManifest
from w2vscale.corpora.preparing import Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.validate import validate_manifest
from w2vscale.errors import UserError


def cuts_of(manifest: PreparedManifest) -> dict[str, Cut]:
    return {cut.id: cut for cut in CutSet.from_file(manifest.path)}


def prepare(audio: Path, out: Path, **arguments: Any) -> Report:
    """`prepare_folder` with options as plain arguments."""
    options = Options(**{name: arguments.pop(name) for name in [*arguments] if name in Options.__dataclass_fields__})
    return prepare_folder(audio, out, options=options, **arguments)


def error_of(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message and "torchaudio" not in message
    return message


WRITTEN = {"headers.sqlite", "cuts_train.jsonl", "prepare_report.json"}


class TestFolder:
    def test_every_format_rate_and_channel_count_is_taken(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare(mixed_audio, tmp_path).manifests
        found = {cut.id: (cut.sampling_rate, round(cut.duration, 2)) for cut in cuts_of(written).values()}
        assert found == {
            "alice-one": (16_000, 3.0),
            "alice-three": (44_100, 3.5),
            "alice-two": (8_000, 2.5),
            "bob-four": (16_000, 4.0),
            "bob-session-five": (48_000, 2.0),
            "six": (44_100, 6.0),
        }
        assert written.utterances == 6
        assert written.hours == pytest.approx(21.0 / 3600, abs=1e-4)
        assert validate_manifest(written.path).bad == 0

    def test_folders_are_speakers_and_texts_beside_files_transcripts(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare(mixed_audio, tmp_path).manifests
        found = {id: (cut.supervisions[0].speaker, cut.supervisions[0].text) for id, cut in cuts_of(written).items()}
        assert found["alice-one"] == ("alice", "HELLO THERE")
        assert found["alice-two"] == ("alice", None)
        assert found["bob-session-five"] == ("bob/session", None)
        assert found["six"] == (None, "zwei Töne")

    def test_paths_are_absolute_so_that_the_manifest_can_be_used_from_anywhere(
        self, mixed_audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(mixed_audio.parent)
        (written,) = prepare(Path("audio"), tmp_path).manifests
        assert all(Path(cut.recording.sources[0].source).is_file() for cut in cuts_of(written).values())
        assert all(Path(cut.recording.sources[0].source).is_absolute() for cut in cuts_of(written).values())

    def test_several_jobs_write_the_same(
        self, mixed_audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("w2vscale.corpora.preparing.FILES_PER_CHUNK", 2)
        found = [prepare(mixed_audio, tmp_path / str(jobs), jobs=jobs).manifests[0] for jobs in (1, 3)]
        assert found[0].path.read_bytes() == found[1].path.read_bytes()

    def test_lines_are_as_lhotse_writes_them(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare(mixed_audio, tmp_path).manifests
        lines = [json.loads(line) for line in written.path.read_text(encoding="utf-8").splitlines()]
        assert lines == [cut.to_dict() for cut in CutSet.from_file(written.path)]
        assert [line["id"] for line in lines] == [
            "alice-one",
            "alice-three",
            "alice-two",
            "bob-four",
            "bob-session-five",
            "six",
        ]

    def test_progress_counts_each_files_header_and_cut(self, mixed_audio: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        prepare(mixed_audio, tmp_path, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(6, 12), (12, 12)]

    def test_segments_of_long_recordings_lose_nothing(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare(mixed_audio, tmp_path, segment_seconds=2.5).manifests
        cuts = list(cuts_of(written).values())
        assert written.utterances == len(cuts) == 11  # 3, 3.5, 4 and 6 s give 2, 2, 2 and 3; 2 and 2.5 s are whole
        assert max(cut.duration for cut in cuts) <= 2.5
        assert sum(cut.duration for cut in cuts) == pytest.approx(21.0, abs=0.01)
        six = sorted((cut for cut in cuts if cut.recording.id == "six"), key=lambda cut: cut.start)
        assert [cut.start for cut in six] == [0.0, 2.5, 5.0]
        build_index(written.path)
        assert validate_manifest(written.path).bad == 0

    def test_a_rest_of_less_than_a_sample_is_no_segment(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "audio" / "a.wav", noise(1.0))
        path.with_suffix(".ctm").write_text("a 1 0.00001 0.99 WORD\n")
        for seconds in (1 / 3 - 1e-6, 0.25, 1 - 1e-5):
            (written,) = prepare(tmp_path / "audio", tmp_path / "out", segment_seconds=seconds).manifests
            cuts = cuts_of(written).values()
            assert min(cut.num_samples for cut in cuts) >= 1
            assert sum(cut.duration for cut in cuts) == pytest.approx(1.0, abs=1e-4)

    def test_validation_share_holds_out_whole_recordings_by_name(self, tmp_path: Path) -> None:
        for number in range(40):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.5, seed=number))
        ids = []
        for attempt in ("one", "two"):
            written = prepare(
                tmp_path / "audio", tmp_path / attempt, validation_share=0.3, segment_seconds=0.2
            ).manifests
            assert [manifest.path.name for manifest in written] == ["cuts_train.jsonl", "cuts_validation.jsonl"]
            ids.append([{cut.recording.id for cut in cuts_of(manifest).values()} for manifest in written])
        assert ids[0] == ids[1]
        train, validation = ids[0]
        assert not train & validation and len(train | validation) == 40
        assert 4 <= len(validation) <= 20

    def test_held_out_recordings_of_an_earlier_call_do_not_stay_beside_all(self, tmp_path: Path) -> None:
        for number in range(4):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.5, seed=number))
        prepare(tmp_path / "audio", tmp_path / "out", validation_share=0.3)
        stale = tmp_path / "out" / "cuts_validation.jsonl"
        message = error_of(prepare, tmp_path / "audio", tmp_path / "out")
        assert message.startswith(f"{stale}: is from an earlier call with --validation-share; delete it")
        stale.unlink()
        assert prepare(tmp_path / "audio", tmp_path / "out").manifests[0].utterances == 4

    def test_a_file_added_later_moves_no_other_between_the_sets(self, tmp_path: Path) -> None:
        for number in range(20):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.5, seed=number))
        before = prepare(tmp_path / "audio", tmp_path / "out", validation_share=0.3).manifests
        held_out = set(cuts_of(before[1]))
        write_audio(tmp_path / "audio" / "another.wav", noise(0.5, seed=99))
        after = prepare(tmp_path / "audio", tmp_path / "out", validation_share=0.3).manifests
        assert held_out - {"another"} == set(cuts_of(after[1])) - {"another"}


class TestCalledAgain:
    @pytest.fixture
    def audio(self, tmp_path: Path) -> Path:
        """Twenty files, in four folders; every second one has a transcript."""
        folder = tmp_path / "audio"
        for number in range(20):
            file = write_audio(folder / f"s{number % 4}" / f"{number}.wav", noise(0.3 + number / 100, seed=number))
            if number % 2:
                file.with_suffix(".txt").write_text(f"TEXT {number}\n")
        return folder

    @pytest.fixture(autouse=True)
    def _in_small_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("w2vscale.corpora.preparing.FILES_PER_CHUNK", 4)

    def again(self, audio: Path, out: Path, **options: Any) -> tuple[int, int]:
        """How many files were read and known; what is written is what another call writes from nothing."""
        report = prepare(audio, out, **options)
        written = report.manifests
        fresh = prepare(audio, out.with_name(f"{out.name}-fresh"), **options).manifests
        assert [one.path.read_bytes() for one in written] == [one.path.read_bytes() for one in fresh]
        assert [(one.utterances, one.hours) for one in written] == [(one.utterances, one.hours) for one in fresh]
        shutil.rmtree(fresh[0].path.parent)
        return report.headers_read, report.headers_unchanged

    def test_nothing_is_read_where_nothing_changed(self, audio: Path, tmp_path: Path) -> None:
        assert self.again(audio, tmp_path / "out") == (20, 0)
        cache = (tmp_path / "out" / "headers.sqlite").read_bytes()
        file = audio / "s3" / "7.wav"
        before, content = file.stat(), file.read_bytes()
        file.write_bytes(bytes(len(content)))  # not even opened: it would be found unreadable
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        report = prepare(audio, tmp_path / "out")
        assert (report.headers_read, report.headers_unchanged, report.unusable) == (0, 20, [])
        assert report.manifests[0].utterances == 20
        assert (tmp_path / "out" / "headers.sqlite").read_bytes() == cache

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_new_changed_and_deleted_files(self, jobs: int, audio: Path, tmp_path: Path) -> None:
        options = {"jobs": jobs, "validation_share": 0.3, "segment_seconds": 0.25}
        self.again(audio, tmp_path / "out", **options)
        write_audio(audio / "s1" / "new.flac", noise(1.0))
        write_audio(audio / "s2" / "10.wav", noise(2.0))
        os.utime(audio / "s3" / "11.wav", ns=(0, 0))  # no longer, but changed
        (audio / "s0" / "4.wav").unlink()
        assert self.again(audio, tmp_path / "out", **options) == (3, 17)
        assert self.again(audio, tmp_path / "out", **options) == (0, 20)
        with closing(HeaderCache(tmp_path / "out" / "headers.sqlite", audio)) as cache:
            assert cache.get("s0/4.wav") is None and cache.get("s0/8.wav") is not None

    def test_transcripts_that_changed_came_or_went(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        (audio / "s1" / "5.txt").write_text("OTHER WORDS")
        (audio / "s2" / "6.txt").write_text("NEW WORDS")
        (audio / "s3" / "7.txt").unlink()
        assert self.again(audio, tmp_path / "out") == (0, 20)
        texts = {
            cut.id: cut.supervisions[0].text
            for cut in CutSet.from_file(tmp_path / "out" / "cuts_train.jsonl")  # type: ignore[union-attr]
        }
        assert [texts[f"s{n % 4}-{n}"] for n in (3, 5, 6, 7)] == ["TEXT 3", "OTHER WORDS", "NEW WORDS", None]

    def test_other_options_use_the_same_headers(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        assert self.again(audio, tmp_path / "out", segment_seconds=0.2, validation_share=0.2) == (0, 20)

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_a_killed_call_is_continued(self, jobs: int, audio: Path, tmp_path: Path) -> None:
        def killed() -> None:
            def kill(done: int, total: int) -> None:
                if done == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare(audio, tmp_path / "out", jobs=jobs, progress=kill)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        assert not [*(tmp_path / "out").glob("*cuts*")]
        assert self.again(audio, tmp_path / "out", jobs=jobs) == (12, 8)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "headers.sqlite",
            "cuts_train.jsonl",
            "prepare_report.json",
        }

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_a_call_killed_while_it_writes_leaves_the_manifest_as_it_was(
        self, jobs: int, audio: Path, tmp_path: Path
    ) -> None:
        (written,) = prepare(audio, tmp_path / "out").manifests
        before = written.path.read_bytes()

        def killed() -> None:
            def kill(done: int, total: int) -> None:
                if done == 32:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare(audio, tmp_path / "out", jobs=jobs, segment_seconds=0.2, progress=kill)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        assert written.path.read_bytes() == before
        assert self.again(audio, tmp_path / "out", jobs=jobs, segment_seconds=0.2) == (0, 20)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "headers.sqlite",
            "cuts_train.jsonl",
            "prepare_report.json",
        }

    def test_a_damaged_cache_starts_empty(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        cache = tmp_path / "out" / "headers.sqlite"
        cache.write_bytes(cache.read_bytes()[:5000])
        assert self.again(audio, tmp_path / "out") == (20, 0)
        assert self.again(audio, tmp_path / "out") == (0, 20)

    def test_another_folder_of_audio_is_read_whole(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        other = Path(shutil.copytree(audio, tmp_path / "other"))
        assert self.again(other, tmp_path / "out") == (20, 0)

    def test_unreadable_files_are_tried_again(self, audio: Path, tmp_path: Path) -> None:
        bad = write_text(audio / "s2" / "bad.flac")
        message = error_of(prepare, audio, tmp_path / "out", jobs=2, strict=True)
        assert message.startswith(f"{bad}: not readable as audio: ")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"headers.sqlite", "prepare_report.json"}
        assert self.again(audio, tmp_path / "out") == (1, 20)
        report = prepare(audio, tmp_path / "out")
        assert (report.manifests[0].utterances, [one.path for one in report.unusable]) == (20, ["s2/bad.flac"])
        write_audio(bad, noise(1.0))
        assert self.again(audio, tmp_path / "out") == (1, 20)


class TestFoldersThatAreRefused:
    def test_a_missing_folder_and_a_file(self, tmp_path: Path) -> None:
        file = write_text(tmp_path / "file.flac")
        for path, problem in ((tmp_path / "no", "no such folder"), (file, "not a folder")):
            assert error_of(prepare, path, tmp_path) == f"{path}: {problem}"

    def test_a_folder_without_audio_and_what_is_there_instead(self, tmp_path: Path) -> None:
        write_text(tmp_path / "audio" / "a.pdf")
        (tmp_path / "audio" / "folder.flac").mkdir()
        message = error_of(prepare, tmp_path / "audio", tmp_path)
        assert message == f"{tmp_path / 'audio'}: no audio in it (1 .pdf: not audio)"

    @pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".m4a", ".webm"])
    def test_a_text_file_named_as_audio(self, suffix: str, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        bad = write_text(tmp_path / "audio" / f"bad{suffix}")
        message = error_of(prepare, tmp_path / "audio", tmp_path, strict=True)
        assert message.startswith(f"{bad}: not readable as audio: ")
        report = prepare(tmp_path / "audio", tmp_path)
        assert report.manifests[0].utterances == 1
        assert [(one.path, one.kind) for one in report.unusable] == [(bad.name, "undecodable")]

    def test_how_many_are_unusable_and_how_to_leave_them_out(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        for number in range(3):
            write_text(tmp_path / "audio" / f"bad{number}.flac")
        message = error_of(prepare, tmp_path / "audio", tmp_path, strict=True)
        assert message.endswith(" (and 2 more of 4 files); without --strict, such files are left out")

    def test_nothing_but_unusable_files(self, tmp_path: Path) -> None:
        write_text(tmp_path / "audio" / "bad.flac")
        assert error_of(prepare, tmp_path / "audio", tmp_path).endswith("no usable file is left")

    def test_too_many_unusable_files(self, tmp_path: Path) -> None:
        for number in range(11):
            write_text(tmp_path / "audio" / f"bad{number}.flac")
            write_audio(tmp_path / "audio" / f"good{number}.flac", noise(0.5))
        message = error_of(prepare, tmp_path / "audio", tmp_path / "out")
        assert message.endswith("(and 10 more of 22 files): that is 50.0%, above --max-bad-fraction 0.05")
        report = json.loads((tmp_path / "out" / "prepare_report.json").read_text())
        assert len(report["unusable"]) == 11 and not report["manifests"]
        assert prepare(tmp_path / "audio", tmp_path / "out", max_bad_fraction=0.5).manifests[0].utterances == 11

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        file = write_audio(tmp_path / "audio" / "good.wav", noise(1.0))
        shutil.copy(file, os.fsencode(file.parent) + b"/b\xffd.wav")
        report = prepare(tmp_path / "audio", tmp_path)
        assert [one.reason for one in report.unusable] == ["its name is not UTF-8: rename it"]
        assert report.manifests[0].utterances == 1

    def test_audio_of_no_samples(self, tmp_path: Path) -> None:
        empty = write_audio(tmp_path / "audio" / "a.wav", np.zeros(0, np.float32))
        assert error_of(prepare, tmp_path / "audio", tmp_path).startswith(f"{empty}: holds no audio")

    def test_two_files_that_would_have_one_id(self, tmp_path: Path) -> None:
        names = ["b/a.wav", "b-a.wav", "b-a.flac"]
        for name in names:
            write_audio(tmp_path / "audio" / name, noise(1.0))
        report = prepare(tmp_path / "audio", tmp_path)
        assert report.notes[SAME_NAME] == 3
        hashes = {name: zlib.crc32(name.encode()) for name in names}
        assert [json.loads(line)["id"] for line in (tmp_path / "cuts_train.jsonl").read_text().splitlines()] == [
            f"b-a.wav-{hashes['b/a.wav']:08x}", "b-a.flac", f"b-a.wav-{hashes['b-a.wav']:08x}"
        ]  # fmt: skip

    @pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
    def test_a_validation_share_out_of_range(self, share: float, mixed_audio: Path, tmp_path: Path) -> None:
        message = error_of(prepare, mixed_audio, tmp_path, validation_share=share)
        assert message.startswith(f"--validation-share {share}: ")

    def test_a_validation_share_that_leaves_a_set_empty(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "a.wav", noise(1.0))
        message = error_of(prepare, tmp_path / "audio", tmp_path, validation_share=0.5)
        assert message == "--validation-share 0.5: leaves no recording for training (number of files: 1)"

    @pytest.mark.parametrize("seconds", [0.0, -3.0, float("nan")])
    def test_segments_of_no_length(self, seconds: float, mixed_audio: Path, tmp_path: Path) -> None:
        message = error_of(prepare, mixed_audio, tmp_path, segment_seconds=seconds)
        assert message.startswith(f"--segment-seconds {seconds}: ")

    def test_an_output_that_cannot_be_written_leaves_nothing_behind(self, mixed_audio: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        assert error_of(prepare, mixed_audio, blocked).startswith(f"{blocked / 'cuts_train.jsonl'}: cannot be")
        assert error_of(prepare, mixed_audio, blocked / "deeper").startswith(str(blocked / "deeper"))
        (tmp_path / "out" / "cuts_train.jsonl").mkdir(parents=True)
        message = error_of(prepare, mixed_audio, tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'out' / 'cuts_train.jsonl'}: cannot be written: ")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"headers.sqlite", "cuts_train.jsonl"}

    def test_a_cache_that_cannot_be_written(self, mixed_audio: Path, tmp_path: Path) -> None:
        (tmp_path / "headers.sqlite").mkdir()
        message = error_of(prepare, mixed_audio, tmp_path)
        assert message.startswith(f"{tmp_path / 'headers.sqlite'}: cannot be written: ")
