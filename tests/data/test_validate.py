"""`data validate`: each disagreement between a manifest and its files is found and named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lhotse.cut import Cut

from tests.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from w2vscale.data.manifest import index_path
from w2vscale.data.validate import Problem, problem_of, validate_manifest
from w2vscale.errors import UserError


@pytest.fixture
def cut(tmp_path: Path) -> Cut:
    return cut_of(write_audio(tmp_path / "a.flac", noise(3.0)))


def says(cut: Cut, **changes: object) -> Cut:
    recording = dataclasses.replace(cut.recording, **changes)
    return dataclasses.replace(cut, recording=recording, duration=recording.duration)


class TestOneUtterance:
    def test_one_that_agrees_has_no_problem(self, cut: Cut) -> None:
        assert problem_of(cut) is None
        assert problem_of(cut.truncate(offset=1.0, duration=2.0)) is None

    @pytest.mark.parametrize("suffix", [".wav", ".ogg", ".opus", ".mp3"])
    def test_every_format_agrees_with_what_lhotse_read_from_it(self, suffix: str, tmp_path: Path) -> None:
        assert problem_of(cut_of(write_audio(tmp_path / f"a{suffix}", noise(2.345)))) is None

    def test_one_that_is_resampled_agrees(self, cut: Cut) -> None:
        assert problem_of(cut.resample(8_000)) is None

    def test_a_wrong_sampling_rate(self, cut: Cut) -> None:
        wrong = says(cut, sampling_rate=8_000, num_samples=24_000)
        assert problem_of(wrong) == "sampling rate is 16000 Hz, the manifest says 8000 Hz"

    def test_a_wrong_duration(self, cut: Cut) -> None:
        wrong = says(cut, num_samples=64_000, duration=4.0)
        assert problem_of(wrong) == "duration is 3.000 s, the manifest says 4.000 s"

    def test_a_cut_beyond_its_recording(self, cut: Cut) -> None:
        beyond = dataclasses.replace(cut, start=1.0)
        assert problem_of(beyond) == "ends at 4.000 s, after its recording's 3.000 s"

    def test_a_missing_file(self, cut: Cut) -> None:
        Path(cut.recording.sources[0].source).unlink()
        assert problem_of(cut) == "no such file"

    def test_a_text_file_named_flac_wherever_it_lies(self, tmp_path: Path) -> None:
        path = tmp_path / ("a-long-folder-name-" * 6) / "a.flac"
        wrong = cut_of(write_audio(path, noise(1.0)))
        write_text(path)
        assert problem_of(wrong) == "not readable as audio: Format not recognised"

    def test_a_channel_that_the_file_does_not_have(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", np.stack([noise(1.0), noise(1.0, seed=1)], axis=1))
        stereo = cut_of(path)
        write_audio(path, noise(1.0))
        assert problem_of(stereo) == "has 1 channels, the manifest wants channel 1"


class TestManifest:
    def test_a_right_one_has_no_problems(self, small_corpus: SmallCorpus) -> None:
        seen: list[tuple[int, int]] = []
        found = validate_manifest(small_corpus.train, progress=lambda done, total: seen.append((done, total)))
        assert (found.utterances, found.problems) == (24, [])
        assert seen == [(24, 24)]

    def test_problems_come_in_the_manifests_order_whatever_the_jobs(self, tmp_path: Path) -> None:
        cuts = [cut_of(write_audio(tmp_path / f"u{n}.wav", noise(0.5, seed=n))) for n in range(20)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
        (tmp_path / "u3.wav").unlink()
        write_text(tmp_path / "u11.wav")
        expected = [
            Problem("u3", str(tmp_path / "u3.wav"), "no such file"),
            Problem("u11", str(tmp_path / "u11.wav"), "not readable as audio: Format not recognised"),
        ]
        for jobs in (1, 4):
            assert validate_manifest(manifest, jobs=jobs).problems == expected

    def test_an_id_that_occurs_twice(self, cut: Cut, tmp_path: Path) -> None:
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut, cut])
        assert [problem.reason for problem in validate_manifest(manifest).problems] == ["the id a occurs twice"]

    def test_a_missing_or_stale_index_is_made(self, cut: Cut, tmp_path: Path) -> None:
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut], index=False)
        assert validate_manifest(manifest).utterances == 1
        assert index_path(manifest).is_file()
        with manifest.open("a") as lines:
            lines.write(manifest.read_text().replace('"id": "a"', '"id": "b"'))
        assert validate_manifest(manifest).utterances == 2

    def test_a_manifest_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "no.jsonl", write_text(tmp_path / "text.jsonl"), tmp_path / "cuts.jsonl.gz"):
            with pytest.raises(UserError, match=str(path)):
                validate_manifest(path)
