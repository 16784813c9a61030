"""`w2vscale data`: manifests of folders and corpora, their index, validation and statistics."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.commands import error_of
from w2vscale.cli.app import app
from w2vscale.data.manifest import index_path


class TestPrepare:
    def test_folder_then_index_then_validate_then_stats(
        self, mixed_audio: Path, tmp_path: Path, run: Callable[..., str]
    ) -> None:
        cuts = tmp_path / "data" / "cuts_train.jsonl"
        printed = run("data", "prepare", "folder", mixed_audio, cuts.parent, "--jobs", 2)
        assert printed.startswith(f"{cuts}: 6 utterances, 0.01 hours\n")
        assert re.search(r"\.txt +2 +transcript *\n", printed) and re.search(r"\.md +1 +not audio *\n", printed)
        assert run("data", "index", cuts) == f"{index_path(cuts)}: 6 utterances\n"
        assert run("data", "validate", cuts) == f"{cuts}: no problem found in the headers of 6 utterances\n"
        printed = run("data", "stats", cuts, "--config", "tiny", "--set", "data.min_seconds=2.2")
        assert re.search(r"utterances +6\b", printed)
        assert re.search(r"speakers +3\b", printed)
        assert re.search(r"transcribed +2\b", printed)
        assert "44100 Hz (2)" in printed and "8000 Hz (1)" in printed
        assert "1 shorter than 2.2 s left out" in printed
        assert "█" in printed  # the histogram

    def test_validation_share_makes_two_manifests(
        self, mixed_audio: Path, tmp_path: Path, run: Callable[..., str]
    ) -> None:
        printed = run(
            "data", "prepare", "folder", mixed_audio, tmp_path, "--validation-share", 0.5, "--segment-seconds", 2
        )
        assert [line.partition(":")[0] for line in printed.splitlines()[:2]] == [
            str(tmp_path / "cuts_train.jsonl"),
            str(tmp_path / "cuts_validation.jsonl"),
        ]

    def test_mini_librispeech(self, shared_data: Path, tmp_path: Path, run: Callable[..., str]) -> None:
        printed = run("data", "prepare", "mini_librispeech", shared_data, tmp_path, "--part", "dev-clean-2")
        assert printed == f"{tmp_path / 'cuts_dev-clean-2.jsonl'}: 58 utterances, 0.20 hours\n"

    def test_a_text_file_named_flac(self, tmp_path: Path, run: Callable[..., str]) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        bad = write_text(tmp_path / "audio" / "bad.flac")
        message = error_of("data", "prepare", "folder", tmp_path / "audio", tmp_path, "--strict")
        assert message == (
            f"{bad}: not readable as audio: Format not recognised; without --strict, such files are left out"
        )
        printed = run("data", "prepare", "folder", tmp_path / "audio", tmp_path)
        assert "1 utterance, 0.00 hours\n" in printed
        assert re.search(r"\.flac +1 +left out: bad.flac: not readable as audio: Format not recognised", printed)
        assert f"details, with the paths of unusable files: {tmp_path / 'prepare_report.json'}" in printed

    def test_an_empty_or_missing_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "no audio in it (it is empty)" in error_of("data", "prepare", "folder", tmp_path / "empty", tmp_path)
        assert "no such folder" in error_of("data", "prepare", "folder", tmp_path / "no", tmp_path)
        assert "contains no part of the corpus" in error_of(
            "data", "prepare", "librispeech", tmp_path / "empty", tmp_path
        )

    def test_an_output_that_cannot_be_written(self, mixed_audio: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        message = error_of("data", "prepare", "folder", mixed_audio, blocked)
        assert message.startswith(f"{blocked / 'cuts_train.jsonl'}: cannot be written: ")

    @pytest.mark.parametrize("command", ["kaldi", "manifest", "fairseq"])
    def test_lists_of_other_toolkits(self, command: str, tmp_path: Path, run: Callable[..., str]) -> None:
        audio = write_audio(tmp_path / "audio" / "a.flac", noise(1.0)).parent
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "wav.scp").write_text(f"a {audio}/a.flac\n")
        (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": f"{audio}/a.flac"}))
        (tmp_path / "m.tsv").write_text(f"{audio}\na.flac\t16000\n")
        source = {"kaldi": "data", "manifest": "m.jsonl", "fairseq": "m.tsv"}[command]
        printed = run("data", "prepare", command, tmp_path / source, tmp_path / "out")
        assert printed == f"{tmp_path / 'out' / f'cuts_{Path(source).stem}.jsonl'}: 1 utterance, 0.00 hours\n"

    def test_corpora_by_name_and_datasets_that_are_missing(self, tmp_path: Path) -> None:
        named = "librilight mls commonvoice gigaspeech peoples_speech aishell huggingface kaldi manifest fairseq"
        for command in named.split():
            message = error_of("data", "prepare", command, tmp_path / "no" / "x", tmp_path / "out")
            assert message.startswith(f"{tmp_path / 'no' / 'x'}") and ": no such f" in message
        message = error_of("data", "prepare", "voxpopuli", tmp_path / "no", tmp_path / "out", "--language", "en")
        assert message == f"{tmp_path / 'no'}: no such folder"


class TestManifests:
    def test_validate_prints_problems_and_ends_with_the_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cuts = [cut_of(write_audio(tmp_path / f"u{n}.wav", noise(0.5, seed=n))) for n in range(40)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
        for number in range(30):
            (tmp_path / f"u{number}.wav").unlink()
        assert error_of("data", "validate", manifest) == (
            f"{manifest}: 30 bad utterances of 40, listed in {manifest}.bad_headers; "
            f"the first one: u0 ({tmp_path / 'u0.wav'}): no such file"
        )
        printed = capsys.readouterr().out.splitlines()
        assert printed == [f"u{n} ({tmp_path / f'u{n}.wav'}): no such file" for n in range(1, 20)]

    def test_all_manifests_are_validated_and_headers_do_not_replace_the_list_of_audio(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        manifests = []
        for name in "abc":
            cut = cut_of(write_audio(tmp_path / f"{name}.wav", noise(0.5)))
            manifests.append(write_manifest(tmp_path / f"{name}.jsonl", [cut]))
            if name != "b":
                write_audio(tmp_path / f"{name}.wav", np.zeros(8_000, np.float32))
        one = "1 bad utterance of 1, listed in"
        assert error_of("data", "validate", *manifests, "--audio").startswith(f"{manifests[2]}: {one}")
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == f"{manifests[1]}: no problem found in 1 utterance"
        assert printed[1].startswith(f"{manifests[0]}: {one} {manifests[0]}.bad_audio; the first one: a ")
        app(args=["data", "validate", *map(str, manifests)], standalone_mode=False)
        assert (
            capsys.readouterr().out.splitlines()[0] == f"{manifests[0]}: no problem found in the headers of 1 utterance"
        )
        assert Path(f"{manifests[0]}.bad_audio").exists() and not Path(f"{manifests[0]}.bad_headers").exists()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"sampling_rate": 8_000, "num_samples": 24_000}, "sampling rate is 16000 Hz, the manifest says 8000 Hz"),
            ({"duration": 4.0, "num_samples": 64_000}, "duration is 3.000 s, the manifest says 4.000 s"),
        ],
    )
    def test_a_manifest_with_a_wrong_rate_or_duration(
        self, changes: dict[str, float], reason: str, tmp_path: Path
    ) -> None:
        cut = cut_of(write_audio(tmp_path / "a.flac", noise(3.0)))
        recording = dataclasses.replace(cut.recording, **changes)
        wrong = dataclasses.replace(cut, recording=recording, duration=recording.duration)
        manifest = write_manifest(tmp_path / "cuts.jsonl", [wrong])
        assert error_of("data", "validate", manifest).endswith(f"({tmp_path / 'a.flac'}): {reason}")
        # The same error stops training before it starts.
        message = error_of("train", "tiny", f"data.train={manifest}", "--exp", tmp_path / "exp")
        assert reason in message and "w2vscale data validate" in message

    def test_several_manifests(self, small_corpus: SmallCorpus, run: Callable[..., str]) -> None:
        printed = run("data", "validate", small_corpus.train, small_corpus.validation)
        assert "24 utterances" in printed and "6 utterances" in printed
        assert re.search(r"utterances +30\b", run("data", "stats", small_corpus.train, small_corpus.validation))

    @pytest.mark.parametrize("name", ["index", "validate", "stats"])
    def test_every_command_names_missing_empty_and_wrong_files(self, name: str, tmp_path: Path) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        text = write_text(tmp_path / "text.jsonl")
        missing = tmp_path / "missing.jsonl"
        for path in (empty, text, missing):
            assert error_of("data", name, path).startswith(f"{path}: ")

    def test_stats_without_an_index_says_how_to_create_it(self, corpus: Path) -> None:
        index_path(corpus).unlink()
        assert error_of("data", "stats", corpus) == (
            f"{corpus}: has no index; create it with: w2vscale data index {corpus}"
        )

    def test_stats_with_settings_that_leave_out_everything(self, corpus: Path) -> None:
        message = error_of("data", "stats", corpus, "--set", "data.min_seconds=12")
        assert message.startswith(f"{corpus}: no utterance is long enough")

    def test_an_index_that_cannot_be_written(self, corpus: Path) -> None:
        index_path(corpus).unlink()
        index_path(corpus).mkdir()
        assert error_of("data", "index", corpus).startswith(f"{index_path(corpus)}: cannot be written")


def test_shards_from_elsewhere_are_indexed(small_corpus: SmallCorpus, tmp_path: Path, run: Callable[..., str]) -> None:
    run("data", "shar", small_corpus.train, tmp_path, "--shard-size", 8)
    index = tmp_path / "shards.index.npy"
    index.unlink()
    assert "24 utterances" in run("data", "index", tmp_path, "--jobs", 2)
    archive = tmp_path / "recording.000001.tar"
    archive.write_bytes(archive.read_bytes()[:-4000])
    lines = run("data", "index", tmp_path).splitlines()
    assert len(lines) == 2 and str(archive) in lines[0]
    assert lines[1] == (
        f"{index}: 3 shards, 23 utterances, 1 bad utterance left out, listed in {tmp_path}/shards.bad_audio.jsonl"
    )
