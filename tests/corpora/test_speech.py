"""Speech found by Silero VAD: what is kept and left out, against the library, on repeated and killed calls."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from numpy.typing import NDArray

from espeak import EspeakProcess, Voice
from sentences import draw_sentence
from tests.helpers.audio import noise, write_audio
from tests.helpers.commands import error_of
from w2vscale.corpora import speech
from w2vscale.corpora.folder import prepare_folder
from w2vscale.corpora.preparing import Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import SHORTEST, Segment
from w2vscale.corpora.speech import PIECE, PIECES, RUN_IN, find_speech
from w2vscale.data.audio import AudioError
from w2vscale.data.resampling import resampled

pytest.importorskip("silero_vad", reason="silero-vad is not installed: pip install 'w2vscale[vad]'")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader is not installed: pip install 'w2vscale[synth]'",
)

RATE = 16_000
FRAME = speech.FRAME / RATE  # seconds


@dataclass(frozen=True)
class Talk:
    """A recording of utterances with pauses between them."""

    audio: NDArray[np.float32]  # [samples], 16 kHz
    utterances: list[Segment]  # seconds

    @property
    def seconds(self) -> float:
        return self.audio.size / RATE


def joined(utterances: list[NDArray[np.float32]], *, noisy: bool) -> Talk:
    """Utterances after pauses of 2, 4 and 6 seconds in turn.

    `noisy`: with white noise of -60 dB everywhere, and of -40 dB in every second pause.
    """
    parts, spans, at = [], [], 0
    for number, utterance in enumerate(utterances):
        pause = np.zeros((2 + 2 * (number % 3)) * RATE, np.float32)
        if noisy and number % 2:
            pause += 1e-2 * np.random.default_rng(number).standard_normal(pause.size, np.float32)
        parts += [pause, utterance]
        at += parts[-2].size
        spans.append(Segment(at / RATE, (at + utterance.size) / RATE))
        at += utterance.size
    audio = np.concatenate([*parts, np.zeros(3 * RATE, np.float32)])
    if noisy:
        audio += 1e-3 * np.random.default_rng(0).standard_normal(audio.size, np.float32)
    return Talk(audio, spans)


def spoken(count: int, *, seed: int = 0) -> list[NDArray[np.float32]]:
    """Sentences by espeak-ng, without silence around them."""
    draws, found = random.Random(seed), []
    with EspeakProcess(Voice("en-us+f2", 160, 10, 50, 50, 7)) as voice:
        for _ in range(count):
            samples = np.frombuffer(voice.speak(draw_sentence(draws)), np.int16).astype(np.float32) / 32768
            audio = np.concatenate([*resampled(iter([samples]), voice.sampling_rate, RATE)])
            loud = np.flatnonzero(np.abs(audio) > 1e-2)
            found.append(audio[loud[0] : loud[-1] + 1])
    return found


@pytest.fixture(scope="module")
def talk() -> Talk:
    return joined(spoken(6), noisy=True)


def prepare(folder: Path, out: Path, *, segment_seconds: float | None = None, **options: object) -> Report:
    return prepare_folder(folder, out, segment_seconds=segment_seconds, options=Options(vad=True, **options))  # type: ignore[arg-type]


def segments_in(out: Path) -> list[Segment]:
    return sorted(Segment(cut.start, cut.end) for cut in CutSet.from_file(out / "cuts_train.jsonl"))


def overlap(ours: list[Segment], theirs: list[Segment]) -> float:
    return sum(max(min(a.end, b.end) - max(a.start, b.start), 0.0) for a in ours for b in theirs)


def shares(talk: Talk, found: list[Segment]) -> tuple[float, float]:
    """The share of the utterances that is kept, and the share of the pauses that is left out."""
    said = sum(end - start for start, end in talk.utterances)
    kept = overlap(talk.utterances, found)
    pauses_kept = sum(end - start for start, end in found) - kept
    return kept / said, 1 - pauses_kept / (talk.seconds - said)


def in_library(audio: NDArray[np.float32]) -> list[Segment]:
    """What the library itself finds, one frame after another."""
    from silero_vad import get_speech_timestamps, load_silero_vad

    threads = torch.get_num_threads()
    found = get_speech_timestamps(torch.from_numpy(audio), load_silero_vad(), speech_pad_ms=speech.PAD_MS)
    torch.set_num_threads(threads)
    return [Segment(part["start"] / RATE, part["end"] / RATE) for part in found]


class TestWhatIsKept:
    @pytest.mark.parametrize("noisy", [False, True])
    @pytest.mark.parametrize("longest", [5.0, None])
    def test_speech_is_kept_and_pauses_are_left_out(self, noisy: bool, longest: float | None, tmp_path: Path) -> None:
        talk = joined(spoken(10, seed=1), noisy=noisy)
        write_audio(tmp_path / "audio" / "talk.wav", talk.audio)
        report = prepare(tmp_path / "audio", tmp_path / "out", segment_seconds=longest)
        found = segments_in(tmp_path / "out")
        kept, dropped = shares(talk, found)
        assert kept >= 0.99 and dropped >= 0.8, (kept, dropped)
        assert all(SHORTEST - 1e-3 <= end - start <= (longest or 30.0) + 1e-3 for start, end in found)
        written = json.loads((tmp_path / "out" / "prepare_report.json").read_text())["speech"]
        assert written["hours"] == pytest.approx(talk.seconds / 3600)
        assert written["share"] == pytest.approx(report.seconds_of_speech / talk.seconds)
        said = sum(end - start for start, end in talk.utterances) / talk.seconds
        assert said - 0.02 <= written["share"] <= said + 0.2  # with the padding

    @pytest.mark.slow
    def test_ten_minutes_of_real_speech(self, shared_data: Path, tmp_path: Path) -> None:
        files = sorted((shared_data / "LibriSpeech" / "dev-clean-2").rglob("*.flac"))
        utterances = [soundfile.read(file, dtype="float32")[0] for number, file in enumerate(files) if number % 4]
        talk = joined(utterances, noisy=True)
        assert talk.seconds > 600
        write_audio(tmp_path / "audio" / "talk.flac", talk.audio)
        write_audio(tmp_path / "audio" / "too.flac", talk.audio[: 60 * RATE])
        manifests = []
        for jobs in (1, 2):
            prepare(tmp_path / "audio", tmp_path / str(jobs), segment_seconds=20.0, jobs=jobs)
            manifests.append((tmp_path / str(jobs) / "cuts_train.jsonl").read_bytes())
        assert manifests[0] == manifests[1]
        cuts = [cut for cut in CutSet.from_file(tmp_path / "1" / "cuts_train.jsonl") if cut.recording_id == "talk"]
        found = [Segment(cut.start, cut.end) for cut in cuts]
        kept, dropped = shares(talk, found)
        print(f"{talk.seconds:.0f} s: kept {kept:.2%} of the speech, left out {dropped:.2%} of the pauses")
        assert kept >= 0.99 and dropped >= 0.8, (kept, dropped)
        assert max(end - start for start, end in found) <= 20.0 + 1e-3

    def test_a_recording_without_speech_is_named(self, talk: Talk, tmp_path: Path) -> None:
        write_audio(tmp_path / "audio" / "talk.wav", talk.audio)
        write_audio(tmp_path / "audio" / "noise.flac", noise(20.0))
        hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(20 * RATE) / RATE)
        write_audio(tmp_path / "audio" / "hum.flac", hum.astype(np.float32))
        write_audio(tmp_path / "audio" / "silence.ogg", np.zeros(5 * RATE, np.float32))
        report = prepare(tmp_path / "audio", tmp_path / "out")
        assert report.others == {(".flac", "no speech was found in it"): 2, (".ogg", "no speech was found in it"): 1}
        assert report.used == {".wav": 1} and not report.unusable
        assert report.seconds == pytest.approx(talk.seconds + 45)

    def test_a_recording_shorter_than_the_shortest_segment_is_one_segment(self, talk: Talk, tmp_path: Path) -> None:
        start = round(talk.utterances[0].start * RATE)
        write_audio(tmp_path / "audio" / "short.wav", talk.audio[start : start + round(1.3 * RATE)])
        prepare(tmp_path / "audio", tmp_path / "out")
        (found,) = segments_in(tmp_path / "out")
        assert found == (0.0, pytest.approx(1.3))

    def test_the_text_of_a_recording_with_one_segment_of_speech(self, talk: Talk, tmp_path: Path) -> None:
        first, second = talk.utterances[:2]
        for name, end in (("one", first.end + 1), ("two", second.end)):
            audio = write_audio(tmp_path / "audio" / f"{name}.wav", talk.audio[: round(end * RATE)])
            audio.with_suffix(".txt").write_text("ALL THAT IS SAID")
        report = prepare(tmp_path / "audio", tmp_path / "out")
        texts: dict[str, set[str | None]] = {"one": set(), "two": set()}
        for cut in CutSet.from_file(tmp_path / "out" / "cuts_train.jsonl"):
            texts[cut.recording_id].add(cut.supervisions[0].text)
        several = len(segments_in(tmp_path / "out")) - 1
        assert texts == {"one": {"ALL THAT IS SAID"}, "two": {None}}
        assert report.notes["segments without text, because the transcript of their recording has no times"] == several


class TestAgainstTheLibrary:
    """The pieces of `find_speech` differ from the library in the state of the model at their borders alone: it is not
    carried over from the beginning, but from the 3.2 seconds before, and from silence at the beginning of the file. A
    probability near the threshold may then move a border by a frame or two."""

    @pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
    def test_a_file_of_one_piece(self, rate: int, talk: Talk, tmp_path: Path) -> None:
        audio = talk.audio[: PIECE * speech.FRAME]
        audio = np.concatenate([*resampled(iter([audio]), RATE, rate)])
        path = write_audio(tmp_path / "talk.wav", audio, rate=rate, subtype="FLOAT")
        expected = in_library(np.concatenate([*resampled(iter([audio]), rate, RATE)]))
        found = find_speech(path)
        assert len(expected) >= 3
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * FRAME + 1e-6)

    def test_pieces_and_batches_of_pieces(self, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = in_library(talk.audio)
        path = write_audio(tmp_path / "talk.wav", talk.audio, subtype="FLOAT")
        whole = find_speech(path)
        monkeypatch.setattr(speech, "PIECE", 2 * RUN_IN)
        monkeypatch.setattr(speech, "PIECES", 3)
        pieces = find_speech(path)
        said = sum(end - start for start, end in expected)
        for found in (whole, pieces):
            both = overlap(found, expected)
            assert both >= 0.99 * said and sum(end - start for start, end in found) <= 1.01 * both

    def test_a_file_longer_than_one_batch_has_no_gap_at_its_border(self, talk: Talk, tmp_path: Path) -> None:
        batch = PIECES * PIECE * speech.FRAME
        audio = np.resize(talk.audio, batch + 40 * RATE)
        write_audio(tmp_path / "long.flac", audio)
        found = find_speech(tmp_path / "long.flac")
        start = batch - 20 * RATE
        expected = [
            Segment(a + start / RATE, b + start / RATE) for a, b in in_library(audio[start : start + 40 * RATE])
        ]
        around = [Segment(batch / RATE - 15, batch / RATE + 15)]
        said = overlap(expected, around)
        assert 15 < said < 30
        assert overlap(found, expected) >= overlap(expected, expected) - 0.2
        assert overlap(found, around) == pytest.approx(said, abs=0.2)

    def test_the_model_goes_on_in_its_state_at_the_border_of_a_batch(
        self, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_ins = []

        def probabilities(model: object, frames: np.ndarray) -> np.ndarray:
            run_ins.append(frames[: speech.RUN_IN].reshape(-1))
            return np.zeros(len(frames) - speech.RUN_IN, np.float32)

        monkeypatch.setattr(speech, "_probabilities", probabilities)
        monkeypatch.setattr(speech, "PIECES", 1)
        monkeypatch.setattr(speech, "PIECE", 2 * RUN_IN)
        batch = 2 * RUN_IN * speech.FRAME
        audio = noise(2.5 * batch / RATE)
        soundfile.write(tmp_path / "long.wav", audio, RATE, subtype="FLOAT")
        find_speech(tmp_path / "long.wav")
        size = speech.RUN_IN * speech.FRAME
        expected = [np.zeros(size), audio[batch - size : batch], audio[2 * batch - size : 2 * batch]]
        assert all(np.array_equal(one, other) for one, other in zip(run_ins, expected, strict=True))

    def test_the_number_of_threads_is_unchanged(self, talk: Talk, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "talk.wav", talk.audio[: 10 * RATE])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            for _ in range(2):
                speech._silero.cache_clear()  # it sets the number when it is loaded
                find_speech(path)
                assert torch.get_num_threads() == 3
            with pytest.raises(AudioError):
                find_speech(tmp_path / "no.wav")
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


class TestChannels:
    @pytest.fixture
    def stereo(self, talk: Talk, tmp_path: Path) -> Path:
        """Speech in the second channel alone."""
        audio = np.stack([1e-3 * noise(talk.seconds)[: talk.audio.size], talk.audio], axis=1)
        return write_audio(tmp_path / "audio" / "stereo.wav", audio)

    def test_speech_is_looked_for_in_the_channel_that_is_used(self, stereo: Path, tmp_path: Path) -> None:
        assert find_speech(stereo, channel=0) == []
        assert len(find_speech(stereo, channel=1)) >= 6
        assert len(find_speech(stereo)) >= 6
        report = prepare(stereo.parent, tmp_path / "out", channel=1)
        assert report.used == {".wav": 1}
        assert {cut.channel for cut in CutSet.from_file(tmp_path / "out" / "cuts_train.jsonl")} == {1}

    def test_a_channel_that_a_file_lacks_is_named(self, stereo: Path, tmp_path: Path) -> None:
        write_audio(stereo.with_name("mono.flac"), noise(3.0))
        report = prepare(stereo.parent, tmp_path / "out", channel=1)
        assert [one[:3] for one in report.unusable] == [
            ("mono.flac", "mismatched", "has 1 channel, numbered from 0, and no channel 1")
        ]
        assert report.used == {".wav": 1}

    def test_channels_that_cancel_and_samples_that_are_not_finite_are_named(self, talk: Talk, tmp_path: Path) -> None:
        audio = talk.audio[: 10 * RATE].copy()
        write_audio(tmp_path / "audio" / "a.wav", np.stack([audio, -audio], axis=1))
        write_audio(tmp_path / "audio" / "good.wav", audio)
        audio[100] = np.nan
        write_audio(tmp_path / "audio" / "b.wav", audio, subtype="FLOAT")
        report = prepare(tmp_path / "audio", tmp_path / "out")
        assert [(one.path, one.kind) for one in report.unusable] == [("a.wav", "cancelling"), ("b.wav", "not finite")]
        assert report.used == {".wav": 1}
        report = prepare(tmp_path / "audio", tmp_path / "out", channel=0)
        assert [one.path for one in report.unusable] == ["b.wav"]
        other = write_audio(
            tmp_path / "other.wav", np.stack([talk.audio[: audio.size], audio], axis=1), subtype="FLOAT"
        )
        assert find_speech(other, channel=0)

    def test_speech_is_found_where_the_channels_cancel_for_some_time(self, talk: Talk, tmp_path: Path) -> None:
        start, end = talk.utterances[0]
        audio = talk.audio[: round((talk.utterances[2][1] + 1.0) * RATE)]
        sign = np.ones_like(audio)
        sign[: round((end + 0.2) * RATE)] = -1.0
        path = write_audio(tmp_path / "a.wav", np.stack([audio, sign * audio], axis=1))
        first = find_speech(path, channel=0)
        assert overlap(first, [Segment(start, end)]) > 0.9 * (end - start)
        assert overlap(find_speech(path), first) > 0.95 * overlap(first, first)


class TestCalledAgain:
    @pytest.fixture
    def audio(self, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Six recordings of one utterance each."""
        monkeypatch.setattr("w2vscale.corpora.preparing.FILES_PER_CHUNK_OF_SPEECH", 1)
        for number, (_, end) in enumerate(talk.utterances):
            stop = round((end + 0.5) * RATE)
            write_audio(tmp_path / "audio" / f"{number}.wav", talk.audio[stop - 4 * RATE : stop])
        return tmp_path / "audio"

    def test_nothing_is_computed_again_with_the_same_options(self, audio: Path, tmp_path: Path) -> None:
        first = prepare(audio, tmp_path / "out")
        manifest = (tmp_path / "out" / "cuts_train.jsonl").read_bytes()
        for file in audio.iterdir():  # were they read again, they would be found unreadable
            before = file.stat()
            file.write_bytes(bytes(before.st_size))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        again = prepare(audio, tmp_path / "out")
        assert (first.headers_read, again.headers_read, again.headers_unchanged) == (6, 0, 6)
        assert (tmp_path / "out" / "cuts_train.jsonl").read_bytes() == manifest
        assert again.seconds_of_speech == first.seconds_of_speech > 0
        other = prepare(audio, tmp_path / "out", segment_seconds=4.0)  # is cut from the same speech
        assert (other.headers_read, other.headers_unchanged) == (0, 6)

    def test_another_channel_or_a_changed_file_is(self, audio: Path, tmp_path: Path) -> None:
        prepare(audio, tmp_path / "out")
        assert prepare(audio, tmp_path / "out", channel=0).headers_read == 6
        assert prepare(audio, tmp_path / "out", channel=0).headers_read == 0
        write_audio(audio / "2.wav", noise(3.0))
        report = prepare(audio, tmp_path / "out", channel=0)
        assert report.headers_read == 1
        assert report.others == {(".wav", "no speech was found in it"): 1}

    def test_a_call_without_vad_and_one_with_it_share_headers(self, audio: Path, tmp_path: Path) -> None:
        plain = prepare_folder(audio, tmp_path / "out")
        assert (plain.headers_read, plain.seconds) == (6, 0.0)
        assert prepare(audio, tmp_path / "out").headers_read == 6
        assert prepare_folder(audio, tmp_path / "out").headers_read == 0
        assert prepare(audio, tmp_path / "out").headers_read == 0

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_a_killed_call_is_continued(self, jobs: int, audio: Path, tmp_path: Path) -> None:
        def killed() -> None:
            def kill(done: int, total: int) -> None:
                if done == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare(audio, tmp_path / "out", jobs=jobs, progress=kill)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        report = prepare(audio, tmp_path / "out", jobs=jobs)
        assert (report.headers_read, report.headers_unchanged) == (3, 3)
        prepare(audio, tmp_path / "fresh")
        written = [(tmp_path / name / "cuts_train.jsonl").read_bytes() for name in ("out", "fresh")]
        assert written[0] == written[1]


class TestCommand:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_without_silero_vad_the_error_is_one_line(
        self, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(8):
            write_audio(tmp_path / "audio" / f"{number}.wav", noise(1.0))
        monkeypatch.setitem(sys.modules, "silero_vad", None)
        speech._silero.cache_clear()
        message = error_of("data", "prepare", "folder", tmp_path / "audio", tmp_path / "out", "--vad", "--jobs", jobs)
        assert message == "--vad needs silero-vad: pip install 'w2vscale[vad]'"
        shutil.rmtree(tmp_path / "out")

    @pytest.mark.parametrize("seconds", [1.0, 3.9])
    def test_segments_shorter_than_twice_the_shortest_are_refused(self, seconds: float, tmp_path: Path) -> None:
        (tmp_path / "audio").mkdir()
        message = error_of(
            "data", "prepare", "folder", tmp_path / "audio", tmp_path, "--vad", "--segment-seconds", seconds
        )
        assert message == f"--segment-seconds {seconds}: must be at least 4.0 where recordings are cut at pauses"
