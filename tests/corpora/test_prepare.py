"""From corpora on disk to manifests: LibriSpeech's layout, and any folder of audio."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import Cut

from tests.helpers.audio import noise, write_audio, write_text
from w2vscale.corpora.index import build_index
from w2vscale.corpora.prepare import PreparedManifest, prepare_folder, prepare_librispeech
from w2vscale.corpora.validate import validate_manifest
from w2vscale.errors import UserError


def cuts_of(manifest: PreparedManifest) -> dict[str, Cut]:
    return {cut.id: cut for cut in CutSet.from_file(manifest.path)}


def error_of(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message and "torchaudio" not in message
    return message


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
        written = prepare_librispeech(corpus, tmp_path / "new" / "folder")
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
        (written,) = prepare_librispeech(corpus, tmp_path, parts=["dev-clean-2"])
        cut = cuts_of(written)["20-7-0001"]
        assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("WORDS OF 1", "20")
        assert (cut.sampling_rate, cut.duration) == (16_000, 2.5)

    def test_mini_takes_its_two_parts_only(self, corpus: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(corpus, tmp_path, mini=True)
        assert [manifest.path.name for manifest in written] == ["cuts_dev-clean-2.jsonl", "cuts_train-clean-5.jsonl"]

    def test_the_folder_above_librispeech_will_do(self, corpus: Path, tmp_path: Path) -> None:
        (written,) = prepare_librispeech(corpus.parent, tmp_path, parts=["test-other"])
        assert written.utterances == 4

    def test_several_jobs_write_the_same(self, corpus: Path, tmp_path: Path) -> None:
        found = [
            prepare_librispeech(corpus, tmp_path / str(jobs), parts=["test-other"], jobs=jobs)[0] for jobs in (1, 2)
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
        assert message == f"{tmp_path}: no part of the corpus in it (looked for dev-clean-2, train-clean-5)"

    def test_a_part_without_utterances_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "dev-clean-2").mkdir()
        message = error_of(prepare_librispeech, tmp_path, tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'dev-clean-2'}: no utterance with a transcript")

    def test_a_text_file_named_flac_is_named(self, tmp_path: Path) -> None:
        corpus = write_librispeech(tmp_path, ("dev-clean-2",))
        bad = write_text(corpus / "dev-clean-2" / "10" / "7" / "10-7-0001.flac")
        assert error_of(prepare_librispeech, corpus, tmp_path / "out") == (
            f"{bad}: not readable as audio: Format not recognised"
        )

    def test_an_output_that_cannot_be_written_is_named(self, corpus: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        message = error_of(prepare_librispeech, corpus, blocked, parts=["test-other"])
        assert message.startswith(f"{blocked / 'cuts_test-other.jsonl'}: cannot be written: ")

    def test_real_speech_gives_its_published_counts(self, shared_data: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(shared_data / "LibriSpeech", tmp_path, mini=True)
        found = {manifest.path.stem: (manifest.utterances, round(60 * manifest.hours, 1)) for manifest in written}
        assert found == {"cuts_train-clean-5": (150, 31.0), "cuts_dev-clean-2": (58, 11.7)}
        assert all(cut.supervisions[0].text for cut in cuts_of(written[0]).values())


class TestFolder:
    def test_every_format_rate_and_channel_count_is_taken(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path)
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
        assert written.left_out == 0
        assert validate_manifest(written.path).bad == 0

    def test_folders_are_speakers_and_texts_beside_files_transcripts(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path)
        found = {id: (cut.supervisions[0].speaker, cut.supervisions[0].text) for id, cut in cuts_of(written).items()}
        assert found["alice-one"] == ("alice", "HELLO THERE")
        assert found["alice-two"] == ("alice", None)
        assert found["bob-session-five"] == ("bob/session", None)
        assert found["six"] == (None, "zwei Töne")

    def test_paths_are_absolute_so_that_the_manifest_can_be_used_from_anywhere(
        self, mixed_audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(mixed_audio.parent)
        (written,) = prepare_folder(Path("audio"), tmp_path)
        assert all(Path(cut.recording.sources[0].source).is_file() for cut in cuts_of(written).values())
        assert all(Path(cut.recording.sources[0].source).is_absolute() for cut in cuts_of(written).values())

    def test_several_jobs_write_the_same(self, mixed_audio: Path, tmp_path: Path) -> None:
        found = [prepare_folder(mixed_audio, tmp_path / str(jobs), jobs=jobs)[0] for jobs in (1, 3)]
        assert found[0].path.read_bytes() == found[1].path.read_bytes()

    def test_lines_are_as_lhotse_writes_them(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path)
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
        prepare_folder(mixed_audio, tmp_path, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(6, 12), (12, 12)]

    def test_windows_cut_long_recordings_and_lose_nothing(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path, window_seconds=2.5)
        cuts = list(cuts_of(written).values())
        assert written.utterances == len(cuts) == 11  # 3, 3.5, 4 and 6 s give 2, 2, 2 and 3; 2 and 2.5 s are whole
        assert max(cut.duration for cut in cuts) <= 2.5
        assert sum(cut.duration for cut in cuts) == pytest.approx(21.0, abs=0.01)
        six = sorted((cut for cut in cuts if cut.recording.id == "six"), key=lambda cut: cut.start)
        assert [cut.start for cut in six] == [0.0, 2.5, 5.0]
        build_index(written.path)
        assert validate_manifest(written.path).bad == 0

    def test_validation_share_holds_out_whole_recordings_by_name(self, tmp_path: Path) -> None:
        for number in range(40):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.5, seed=number))
        ids = []
        for attempt in ("one", "two"):
            written = prepare_folder(tmp_path / "audio", tmp_path / attempt, validation_share=0.3, window_seconds=0.2)
            assert [manifest.path.name for manifest in written] == ["cuts_train.jsonl", "cuts_validation.jsonl"]
            ids.append([{cut.recording.id for cut in cuts_of(manifest).values()} for manifest in written])
        assert ids[0] == ids[1]
        train, validation = ids[0]
        assert not train & validation and len(train | validation) == 40
        assert 4 <= len(validation) <= 20

    def test_a_file_added_later_moves_no_other_between_the_sets(self, tmp_path: Path) -> None:
        for number in range(20):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.5, seed=number))
        before = prepare_folder(tmp_path / "audio", tmp_path / "out", validation_share=0.3)
        held_out = set(cuts_of(before[1]))
        write_audio(tmp_path / "audio" / "another.wav", noise(0.5, seed=99))
        after = prepare_folder(tmp_path / "audio", tmp_path / "out", validation_share=0.3)
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
        monkeypatch.setattr("w2vscale.corpora.prepare.CHUNK", 4)

    def again(self, audio: Path, out: Path, **options: Any) -> tuple[int, int]:
        """How many files were read and known; what is written is what another call writes from nothing."""
        written = prepare_folder(audio, out, **options)
        fresh = prepare_folder(audio, out.with_name(f"{out.name}-fresh"), **options)
        assert [one.path.read_bytes() for one in written] == [one.path.read_bytes() for one in fresh]
        assert [(one.utterances, one.hours) for one in written] == [(one.utterances, one.hours) for one in fresh]
        shutil.rmtree(fresh[0].path.parent)
        assert len({(one.read, one.known) for one in written}) == 1
        return written[0].read, written[0].known

    def test_nothing_is_read_where_nothing_changed(self, audio: Path, tmp_path: Path) -> None:
        assert self.again(audio, tmp_path / "out") == (20, 0)
        journal = (tmp_path / "out" / "headers.jsonl").read_bytes()
        file = audio / "s3" / "7.wav"
        before, content = file.stat(), file.read_bytes()
        file.write_bytes(bytes(len(content)))  # not even opened: it would be found unreadable
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        (written,) = prepare_folder(audio, tmp_path / "out")
        assert (written.read, written.known, written.left_out, written.utterances) == (0, 20, 0, 20)
        assert (tmp_path / "out" / "headers.jsonl").read_bytes() == journal

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_new_changed_and_deleted_files(self, jobs: int, audio: Path, tmp_path: Path) -> None:
        options = {"jobs": jobs, "validation_share": 0.3, "window_seconds": 0.25}
        self.again(audio, tmp_path / "out", **options)
        write_audio(audio / "s1" / "new.flac", noise(1.0))
        write_audio(audio / "s2" / "10.wav", noise(2.0))
        os.utime(audio / "s3" / "11.wav", ns=(0, 0))  # no longer, but changed
        (audio / "s0" / "4.wav").unlink()
        assert self.again(audio, tmp_path / "out", **options) == (3, 17)
        assert self.again(audio, tmp_path / "out", **options) == (0, 20)
        lines = (tmp_path / "out" / "headers.jsonl").read_text().splitlines()
        assert len(lines) == 21 and not any("s0/4.wav" in line for line in lines)

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
        assert self.again(audio, tmp_path / "out", window_seconds=0.2, validation_share=0.2) == (0, 20)

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_a_killed_call_is_continued(self, jobs: int, audio: Path, tmp_path: Path) -> None:
        def killed() -> None:
            def kill(done: int, total: int) -> None:
                if done == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare_folder(audio, tmp_path / "out", jobs=jobs, progress=kill)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["headers.jsonl"]
        assert self.again(audio, tmp_path / "out", jobs=jobs) == (12, 8)

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_a_call_killed_while_it_writes_leaves_the_manifest_as_it_was(
        self, jobs: int, audio: Path, tmp_path: Path
    ) -> None:
        (written,) = prepare_folder(audio, tmp_path / "out")
        before = written.path.read_bytes()

        def killed() -> None:
            def kill(done: int, total: int) -> None:
                if done == 32:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare_folder(audio, tmp_path / "out", jobs=jobs, window_seconds=0.2, progress=kill)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        assert written.path.read_bytes() == before
        assert self.again(audio, tmp_path / "out", jobs=jobs, window_seconds=0.2) == (0, 20)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"headers.jsonl", "cuts_train.jsonl"}

    @pytest.mark.parametrize("cut_off", [1, 30, 10_000])
    def test_a_journal_that_was_cut_off(self, cut_off: int, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        journal = tmp_path / "out" / "headers.jsonl"
        content = journal.read_bytes()
        journal.write_bytes(content[:-cut_off])
        kept = journal.read_bytes().count(b"\n") - 1
        assert self.again(audio, tmp_path / "out") == (20 - kept, kept)
        assert sorted(journal.read_bytes().splitlines()) == sorted(content.splitlines())

    @pytest.mark.parametrize(
        "content", [b"", b"\x00" * 500, b"text\n", b'{"folder": "/elsewhere"}\n{"file": "s0/0.wav"']
    )
    def test_a_journal_of_something_else_is_begun_anew(self, content: bytes, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        (tmp_path / "out" / "headers.jsonl").write_bytes(content)
        assert self.again(audio, tmp_path / "out") == (20, 0)
        assert self.again(audio, tmp_path / "out") == (0, 20)

    def test_a_damaged_line_costs_one_header(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        journal = tmp_path / "out" / "headers.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        lines[5] = b"\x00" * (len(lines[5]) - 1) + b"\n"
        journal.write_bytes(b"".join(lines))
        assert self.again(audio, tmp_path / "out") == (1, 19)
        assert b"\x00" not in journal.read_bytes()

    def test_another_folder_of_audio_is_read_whole(self, audio: Path, tmp_path: Path) -> None:
        self.again(audio, tmp_path / "out")
        other = Path(shutil.copytree(audio, tmp_path / "other"))
        assert self.again(other, tmp_path / "out") == (20, 0)

    def test_unreadable_files_are_tried_again(self, audio: Path, tmp_path: Path) -> None:
        bad = write_text(audio / "s2" / "bad.flac")
        message = error_of(prepare_folder, audio, tmp_path / "out", jobs=2)
        assert message.startswith(f"{bad}: not readable as audio: ")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["headers.jsonl"]
        assert self.again(audio, tmp_path / "out", skip_unreadable=True) == (1, 20)
        (written,) = prepare_folder(audio, tmp_path / "out", skip_unreadable=True)
        assert (written.utterances, written.left_out) == (20, 1)
        write_audio(bad, noise(1.0))
        assert self.again(audio, tmp_path / "out") == (1, 20)


class TestFoldersThatAreRefused:
    def test_a_missing_folder_and_a_file(self, tmp_path: Path) -> None:
        file = write_text(tmp_path / "file.flac")
        for path in (tmp_path / "no", file):
            assert error_of(prepare_folder, path, tmp_path) == f"{path}: no such folder"

    def test_a_folder_without_audio(self, tmp_path: Path) -> None:
        write_text(tmp_path / "audio" / "a.txt")
        (tmp_path / "audio" / "folder.flac").mkdir()
        message = error_of(prepare_folder, tmp_path / "audio", tmp_path)
        assert message == f"{tmp_path / 'audio'}: no audio in it (looked for .flac, .mp3, .ogg, .opus, .wav)"

    @pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg", ".opus", ".mp3"])
    def test_a_text_file_named_as_audio(self, suffix: str, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        bad = write_text(tmp_path / "audio" / f"bad{suffix}")
        assert error_of(prepare_folder, tmp_path / "audio", tmp_path).startswith(f"{bad}: not readable as audio: ")
        (written,) = prepare_folder(tmp_path / "audio", tmp_path, skip_unreadable=True)
        assert (written.utterances, written.left_out) == (1, 1)

    def test_how_many_are_unreadable_and_how_to_leave_them_out(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        for number in range(3):
            write_text(tmp_path / "audio" / f"bad{number}.flac")
        message = error_of(prepare_folder, tmp_path / "audio", tmp_path)
        assert message.endswith("and 2 more of 4 files; leave such files out with --skip-unreadable")

    def test_nothing_but_unreadable_files_even_when_they_are_to_be_skipped(self, tmp_path: Path) -> None:
        write_text(tmp_path / "audio" / "bad.flac")
        message = error_of(prepare_folder, tmp_path / "audio", tmp_path, skip_unreadable=True)
        assert message.endswith("no other file is left")

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        file = write_audio(tmp_path / "audio" / "good.wav", noise(1.0))
        shutil.copy(file, os.fsencode(file.parent) + b"/b\xffd.wav")
        assert "its name is not UTF-8: rename it" in error_of(prepare_folder, tmp_path / "audio", tmp_path)
        (written,) = prepare_folder(tmp_path / "audio", tmp_path, skip_unreadable=True)
        assert (written.utterances, written.left_out) == (1, 1)

    def test_audio_of_no_samples(self, tmp_path: Path) -> None:
        empty = write_audio(tmp_path / "audio" / "a.wav", np.zeros(0, np.float32))
        assert error_of(prepare_folder, tmp_path / "audio", tmp_path).startswith(f"{empty}: holds no audio")

    @pytest.mark.parametrize(("one", "other"), [("a.wav", "a.flac"), ("b/a.wav", "b-a.wav"), ("a.wav", "a.WAV")])
    def test_two_files_that_would_have_one_id(self, one: str, other: str, tmp_path: Path) -> None:
        for name in (one, other):
            write_audio(tmp_path / "audio" / name, noise(1.0))
        message = error_of(prepare_folder, tmp_path / "audio", tmp_path)
        assert one in message and other in message and "same id" in message

    @pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
    def test_a_validation_share_out_of_range(self, share: float, mixed_audio: Path, tmp_path: Path) -> None:
        message = error_of(prepare_folder, mixed_audio, tmp_path, validation_share=share)
        assert message.startswith(f"--validation-share {share}: ")

    def test_a_validation_share_that_leaves_a_set_empty(self, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "a.wav", noise(1.0))
        message = error_of(prepare_folder, tmp_path / "audio", tmp_path, validation_share=0.5)
        assert message == "--validation-share 0.5: leaves a set of 1 recordings empty"

    @pytest.mark.parametrize("window", [0.0, -3.0, float("nan")])
    def test_windows_of_no_length(self, window: float, mixed_audio: Path, tmp_path: Path) -> None:
        message = error_of(prepare_folder, mixed_audio, tmp_path, window_seconds=window)
        assert message.startswith(f"--window {window}: ")

    def test_an_output_that_cannot_be_written_leaves_nothing_behind(self, mixed_audio: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        assert error_of(prepare_folder, mixed_audio, blocked).startswith(f"{blocked / 'cuts_train.jsonl'}: cannot be")
        assert error_of(prepare_folder, mixed_audio, blocked / "deeper").startswith(str(blocked / "deeper"))
        (tmp_path / "out" / "cuts_train.jsonl").mkdir(parents=True)
        message = error_of(prepare_folder, mixed_audio, tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'out' / 'cuts_train.jsonl'}: cannot be written: ")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"headers.jsonl", "cuts_train.jsonl"}

    def test_a_journal_that_cannot_be_written(self, mixed_audio: Path, tmp_path: Path) -> None:
        (tmp_path / "headers.jsonl").mkdir()
        message = error_of(prepare_folder, mixed_audio, tmp_path)
        assert message.startswith(f"{tmp_path / 'headers.jsonl'}: cannot be written: ")
