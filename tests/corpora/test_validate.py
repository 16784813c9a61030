"""`data validate`: each disagreement between a manifest and its files is found and named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from lhotse.cut import Cut

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.processes import Started
from w2vscale.corpora.parallel import WHOLE, Part
from w2vscale.corpora.validate import listing_path, validate_manifest
from w2vscale.data.audio import AudioError, check_header
from w2vscale.data.manifest import index_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError


@pytest.fixture
def cut(tmp_path: Path) -> Cut:
    return cut_of(write_audio(tmp_path / "a.flac", noise(3.0)))


def problem_of(cut: Cut) -> str | None:
    try:
        check_header(cut)
    except AudioError as error:
        return str(error)
    return None


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
        assert problem_of(beyond) == "ends at 4.000 s, after the end of its recording (3.000 s)"

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
        assert problem_of(stereo) == "number of channels is 1, the manifest says 2"


def listed(manifest: Path, *, audio: bool = False, part: Part = WHOLE) -> list[BadAudio]:
    path = listing_path(manifest, audio=audio, part=part)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() or part == WHOLE else []
    return [BadAudio(**json.loads(line)) for line in lines]


class TestManifest:
    def test_a_right_one_has_no_problems(self, small_corpus: SmallCorpus) -> None:
        seen: list[tuple[int, int]] = []
        found = validate_manifest(small_corpus.train, progress=lambda done, total: seen.append((done, total)))
        assert (found.utterances, found.bad, found.first) == (24, 0, [])
        assert seen == [(24, 24)]
        assert not found.listing.exists()

    @pytest.mark.parametrize("audio", [False, True])
    def test_problems_come_in_the_manifests_order_whatever_the_jobs(self, audio: bool, tmp_path: Path) -> None:
        good = write_audio(tmp_path / "good.wav", noise(0.1))
        cuts = [cut_of(good, identifier=f"u{number}") for number in range(600)]
        for number in (3, 11, 290):
            cuts[number] = cut_of(write_audio(tmp_path / f"{number}.wav", noise(0.1)), identifier=f"u{number}")
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
        for number in (3, 290):
            (tmp_path / f"{number}.wav").unlink()
        write_text(tmp_path / "11.wav")
        reason = "not readable as audio: Format not recognised"
        expected = [
            BadAudio("u3", str(tmp_path / "3.wav"), "missing", "no such file"),
            BadAudio("u11", str(tmp_path / "11.wav"), "undecodable", reason),
            BadAudio("u290", str(tmp_path / "290.wav"), "missing", "no such file"),
        ]
        for jobs in (1, 3):
            seen: list[int] = []
            found = validate_manifest(
                manifest, jobs=jobs, audio=audio, progress=lambda done, total, seen=seen: seen.append(done)
            )
            assert (found.utterances, found.bad, found.first) == (600, 3, expected)
            assert listed(manifest, audio=audio) == expected
            assert len(seen) > 2 and seen == sorted(seen) and seen[-1] == 600

    def test_all_are_listed_until_they_are_mended(self, tmp_path: Path) -> None:
        missing = [cut_of(write_audio(tmp_path / f"ü{n}.wav", noise(0.1))) for n in range(30)]
        manifest = write_manifest(tmp_path / "cuts_train.jsonl", missing)
        for number in range(30):
            (tmp_path / f"ü{number}.wav").unlink()
        found = validate_manifest(manifest)
        assert (found.bad, len(found.first)) == (30, 20)
        assert [bad.utterance for bad in listed(manifest)] == [cut.id for cut in missing]
        assert found.listing not in tmp_path.glob("cuts_*.jsonl")  # what recipes take for manifests
        for number in range(30):
            write_audio(tmp_path / f"ü{number}.wav", noise(0.1))
        assert validate_manifest(manifest).bad == 0
        assert not found.listing.exists()

    def test_a_list_that_cannot_be_written(self, cut: Cut, tmp_path: Path) -> None:
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut])
        listing_path(manifest, audio=False).mkdir()
        with pytest.raises(UserError, match=rf"^{listing_path(manifest, audio=False)}: cannot be written: "):
            validate_manifest(manifest)

    def test_ids_that_occur_again(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", noise(0.1))
        gone = write_audio(tmp_path / "gone.wav", noise(0.1))
        ids = [f"u{number}" for number in range(300)] + ["u7", "u7", "gone"]
        cuts = [cut_of(gone, identifier="gone"), *(cut_of(path, identifier=name) for name in ids[:-1])]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [*cuts, cut_of(gone, identifier="gone")])
        gone.unlink()
        found = validate_manifest(manifest, jobs=2)
        assert [(bad.utterance, bad.reason) for bad in found.first] == [
            ("gone", "no such file"),
            ("gone", "no such file"),  # a second problem of the same utterance is not counted
            ("u7", "the id u7 occurs twice"),
            ("u7", "the id u7 occurs twice"),
        ]

    @pytest.mark.parametrize("count", [2, 3, 9])
    @pytest.mark.parametrize("audio", [False, True])
    def test_all_parts_together_are_the_whole(self, audio: bool, count: int, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", noise(0.1))
        gone = write_audio(tmp_path / "gone.wav", noise(0.1))
        names = ["u0", "gone", "u2", "u3", "u0", "u5", "gone", "u2"]
        cuts = [cut_of(gone if name == "gone" else path, identifier=name) for name in names]
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts, index=False)
        with manifest.open("a") as lines:
            lines.write("{}\n")
        gone.unlink()
        whole = validate_manifest(manifest, audio=audio)
        parts = [validate_manifest(manifest, jobs=1, audio=audio, part=Part(n, count)) for n in range(1, count + 1)]
        assert sum(part.utterances for part in parts) == whole.utterances == 9
        assert sum(part.bad for part in parts) == whole.bad == 5
        found = [bad for n in range(1, count + 1) for bad in listed(manifest, audio=audio, part=Part(n, count))]
        assert sorted(found, key=repr) == sorted(listed(manifest, audio=audio), key=repr)

    def test_a_line_that_lacks_what_lhotse_needs(self, cut: Cut, tmp_path: Path) -> None:
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut], index=False)
        line = {key: value for key, value in cut.to_dict().items() if key != "start"}
        with manifest.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        (bad,) = validate_manifest(manifest).first
        assert bad.utterance == "utterance 2" and "utterance 2 is not a Lhotse cut" in bad.reason

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


class TestDecoding:
    def test_finds_what_headers_do_not_show(self, tmp_path: Path) -> None:
        names = ("good", "cut-short", "not-finite", "silent", "part-of-a-pause", "resampled")
        audio = {name: noise(3.0, seed=seed) for seed, name in enumerate(names)}
        audio["not-finite"][777] = np.nan
        audio["silent"][:] = 0.25
        audio["part-of-a-pause"][16_000:32_000] = 0.0
        paths = {
            name: write_audio(tmp_path / f"{name}.wav", samples, subtype="FLOAT") for name, samples in audio.items()
        }
        paths["cut-short"] = write_audio(tmp_path / "cut-short.flac", audio["cut-short"])
        paths["resampled"] = write_audio(tmp_path / "resampled.mp3", noise(3.0, rate=44_100), rate=44_100)
        cuts = [cut_of(path) for path in paths.values()]
        cuts.append(cut_of(paths["part-of-a-pause"]).truncate(offset=1.2, duration=0.5).with_id("pause"))
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
        content = paths["cut-short"].read_bytes()
        paths["cut-short"].write_bytes(content[: len(content) // 2])
        assert validate_manifest(manifest).bad == 0
        found = validate_manifest(manifest, audio=True, jobs=2)
        assert [(bad.utterance, bad.kind) for bad in found.first] == [
            ("cut-short", "undecodable"),
            ("not-finite", "not finite"),
            ("silent", "silent"),
            ("pause", "silent"),
        ]
        assert found.first == listed(manifest, audio=True)
        assert "\n" not in "".join(bad.reason for bad in found.first)

    def test_finds_what_headers_show(self, cut: Cut, tmp_path: Path) -> None:
        manifest = write_manifest(tmp_path / "cuts.jsonl", [says(cut, num_samples=64_000, duration=4.0)])
        (bad,) = validate_manifest(manifest, audio=True, jobs=1).first
        assert (bad.kind, bad.reason) == ("mismatched", "duration is 3.000 s, the manifest says 4.000 s")

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_a_process_that_dies_is_one_line_that_says_where(self, jobs: int, tmp_path: Path, started: Started) -> None:
        path = write_audio(tmp_path / "a.wav", noise(0.2))
        manifest = write_manifest(
            tmp_path / "cuts.jsonl", [cut_of(path, identifier=f"u{number}") for number in range(400)]
        )

        def kill(done: int, total: int) -> None:
            for process in started():
                process.kill()

        with pytest.raises(UserError) as caught:
            validate_manifest(manifest, audio=True, jobs=jobs, progress=kill)
        message = str(caught.value)
        assert re.fullmatch(
            rf"{manifest}: a worker process died: it was killed, perhaps for lack of memory \(use fewer --jobs\), or "
            r"crashed; it was reading an utterance between u\d+ and u\d+",
            message,
        ), message
        assert started() == []
