"""Reading the audio of a crop: formats, sampling rates, channels, and one line of reason for bad audio."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray

from tests.helpers.audio import cut_of, noise, tone, write_audio
from tests.helpers.batches import config_with, dataset_of
from w2vscale.corpora.folder import prepare_folder
from w2vscale.corpora.index import build_index
from w2vscale.data.audio import AudioError, read_audio

RATE = 16_000


def read(cut: Cut, *, offset: int = 0, length: int | None = None, normalize: bool = False) -> NDArray[np.float32]:
    whole = round(cut.duration * RATE)
    return read_audio(
        cut, sampling_rate=RATE, offset=offset, length=whole if length is None else length, normalize=normalize
    )


def strongest_frequency(audio: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(audio.size)))
    return float(np.argmax(spectrum) * RATE / audio.size)


class TestReadingAudio:
    @pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg", ".opus"])
    def test_a_crop_equals_the_slice_of_the_whole(self, suffix: str, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / f"a{suffix}", noise(3.21, seed=1)))
        whole = read(cut)
        assert whole.dtype == np.float32 and whole.shape == (51_360,)
        for offset, length in ((0, 16_000), (1, 1), (777, 30_001), (51_360 - 20_000, 20_000), (51_359, 1), (3, 51_357)):
            if length > 1:  # a single sample is refused as silence
                assert np.array_equal(read(cut, offset=offset, length=length), whole[offset : offset + length])

    def test_an_mp3_crop_equals_the_slice_of_the_whole_after_the_start_of_the_decoder(self, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.mp3", noise(3.0, seed=1)))
        crop, whole = read(cut, offset=12_345, length=20_000), read(cut)[12_345:32_345]
        assert np.allclose(crop[3000:], whole[3000:], atol=1e-4)

    def test_the_offset_in_a_cut_counts_from_the_start_of_the_cut(self, tmp_path: Path) -> None:
        audio = noise(5.0, seed=1)
        window = cut_of(write_audio(tmp_path / "a.wav", audio)).truncate(offset=1.5, duration=3.0)
        assert np.allclose(read(window), audio[24_000:72_000], atol=1e-4)
        assert np.allclose(read(window, offset=8_000, length=16_000), audio[32_000:48_000], atol=1e-4)

    def test_a_constant_is_added_to_the_variance(self, tmp_path: Path) -> None:
        """As in `torch.nn.functional.layer_norm`, with which fairseq normalises, and eps=1e-5."""
        audio = 0.004 * noise(3.0, seed=1) + np.float32(0.01)
        cut = cut_of(write_audio(tmp_path / "a.wav", audio, subtype="FLOAT"))
        expected = torch.nn.functional.layer_norm(torch.from_numpy(audio), audio.shape).numpy()
        for offset, length in ((0, audio.size), (1000, 20_000)):
            found = read_audio(cut, sampling_rate=RATE, offset=offset, length=length, normalize=True, eps=1e-5)
            assert np.allclose(found, expected[offset : offset + length], atol=1e-4)
        assert np.abs(expected).max() < 0.8 * np.abs(read(cut, normalize=True)).max()

    def test_normalisation_uses_mean_and_variance_of_the_whole_utterance(self, tmp_path: Path) -> None:
        audio = np.concatenate([0.1 * noise(2.0, seed=1), noise(2.0, seed=2)]) + np.float32(0.05)
        cut = cut_of(write_audio(tmp_path / "a.wav", audio, subtype="FLOAT"))
        expected = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        assert np.allclose(read(cut, normalize=True), expected, atol=1e-5)
        quiet = read(cut, offset=1000, length=20_000, normalize=True)
        assert np.allclose(quiet, expected[1000:21_000], atol=1e-5)
        assert quiet.std() < 0.3

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_other_rates_are_resampled_to_the_right_length_and_pitch(self, rate: int, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", tone(3.3, 1000.0, rate=rate), rate=rate))
        assert read(cut).shape == (52_800,)
        assert strongest_frequency(read(cut)) == pytest.approx(1000.0, abs=1.0)
        for offset in (0, 12_345, 52_800 - 32_000):
            crop = read(cut, offset=offset, length=32_000)
            assert crop.shape == (32_000,)
            assert strongest_frequency(crop) == pytest.approx(1000.0, abs=1.0)

    def test_a_resampled_crop_has_the_right_offset(self, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", noise(3.0, rate=48_000, seed=1), rate=48_000))
        crop, whole = read(cut, offset=10_000, length=20_000), read(cut)[10_000:30_000]
        assert np.allclose(crop[200:-200], whole[200:-200], atol=1e-3)

    @pytest.mark.parametrize("installed", [True, False])
    def test_resampling_does_not_depend_on_torchaudio(
        self, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", noise(3.0, rate=44_100, seed=1), rate=44_100))
        twice = cut.resample(22_050)  # one transform from the manifest, one of ours
        available = "lhotse.augmentation.torchaudio.is_torchaudio_available"
        monkeypatch.setattr(available, lambda: True)
        expected = [lhotse.load_audio()[0] for lhotse in (cut.resample(RATE), twice.resample(RATE))]
        monkeypatch.setattr(available, lambda: installed)
        found = [read(cut), read(twice)]
        assert all(map(np.array_equal, found, expected))

    def test_channels_are_averaged(self, tmp_path: Path) -> None:
        left, right = noise(2.0, seed=1), noise(2.0, seed=2)
        cut = cut_of(write_audio(tmp_path / "a.wav", np.stack([left, right], axis=1)))
        assert np.allclose(read(cut), (left + right) / 2, atol=1e-4)
        assert np.allclose(read(cut, offset=500, length=9_000), ((left + right) / 2)[500:9_500], atol=1e-4)

    @pytest.mark.parametrize("samples", [16_001, 33_333, 44_444, 52_799])
    def test_every_sample_of_an_odd_duration_is_read(self, samples: int, tmp_path: Path) -> None:
        audio = noise(samples / RATE, seed=1)
        cut = cut_of(write_audio(tmp_path / "a.flac", audio))
        assert np.allclose(read(cut), audio, atol=1e-4)
        last = read(cut, offset=samples - 9_999, length=9_999)
        assert np.allclose(last, audio[-9_999:], atol=1e-4)

    def test_mixed_formats_of_a_prepared_folder_can_all_be_read(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path).manifests
        build_index(written.path)
        dataset = dataset_of(written.path, config_with())
        batches = [dataset[number] for number in range(dataset.plan.per_epoch)]
        assert [batch.bad for batch in batches] == [()] * len(batches)
        assert sum(batch.utterances for batch in batches) == 6


def _with_sample(audio: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    changed = audio.copy()
    changed[20_000] = value
    return changed


def _with(cut: Cut, **changes: object) -> Cut:
    recording = dataclasses.replace(cut.recording, **changes)
    return dataclasses.replace(cut, recording=recording, duration=recording.duration)


def _missing(path: Path) -> Cut:
    cut = cut_of(write_audio(path / "a.flac", noise(3.0)))
    (path / "a.flac").unlink()
    return cut


def _overwritten(path: Path, content: bytes, suffix: str = ".flac") -> Cut:
    cut = cut_of(write_audio(path / f"a{suffix}", noise(3.0)))
    (path / f"a{suffix}").write_bytes(content)
    return cut


def _half(path: Path, suffix: str) -> Cut:
    cut = cut_of(write_audio(path / f"a{suffix}", noise(3.0)))
    content = (path / f"a{suffix}").read_bytes()
    (path / f"a{suffix}").write_bytes(content[: len(content) // 2])
    return cut


def _wav(path: Path, audio: NDArray[np.float32], *, rate: int = RATE) -> Cut:
    return cut_of(write_audio(path / "a.wav", audio, rate=rate, subtype="FLOAT"))


BAD: dict[str, tuple[Callable[[Path], Cut], str]] = {
    "missing": (_missing, "no such file"),
    "text": (lambda path: _overwritten(path, b"hello\n" * 99), "not readable as audio: Format not recognised"),
    "text named opus": (lambda path: _overwritten(path, b"hello\n" * 99, ".opus"), "not readable as audio"),
    "empty file": (lambda path: _overwritten(path, b""), "not readable as audio"),
    "half a flac": (lambda path: _half(path, ".flac"), "cannot be decoded"),
    "half a wav": (lambda path: _half(path, ".wav"), "a part of it is missing: its header says 96,000 bytes of audio"),
    "half an mp3": (lambda path: _half(path, ".mp3"), "of 48000 samples"),
    "half an opus": (lambda path: _half(path, ".opus"), "a part of it is missing: its stream of Ogg ends"),
    "not a number": (lambda path: _wav(path, _with_sample(noise(3.0), np.nan)), "not finite"),
    "infinite": (lambda path: _wav(path, _with_sample(noise(3.0), np.inf)), "not finite"),
    "silence": (lambda path: _wav(path, np.zeros(48_000, np.float32)), "is silent"),
    "a constant": (lambda path: _wav(path, np.full(48_000, 0.25, np.float32)), "is silent"),
    "another rate": (
        lambda path: _with(_wav(path, noise(3.0, rate=8_000), rate=8_000), sampling_rate=RATE, num_samples=48_000),
        "sampling rate is 8000 Hz, the manifest says 16000 Hz",
    ),
    "a longer duration": (
        lambda path: _with(_wav(path, noise(3.0)), num_samples=80_000, duration=5.0),
        "duration is 3.000 s, the manifest says 5.000 s",
    ),
    "a shorter duration": (
        lambda path: _with(_wav(path, noise(3.0)), num_samples=32_000, duration=2.0),
        "duration is 3.000 s, the manifest says 2.000 s",
    ),
    "a cut beyond its recording": (
        lambda path: dataclasses.replace(_wav(path, noise(3.0)), duration=5.0),
        "ends at 5.000 s, after the end of its recording (3.000 s)",
    ),
}


class TestBadAudio:
    @pytest.mark.parametrize("kind", BAD)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_the_reason_is_one_line(self, kind: str, normalize: bool, tmp_path: Path) -> None:
        make, reason = BAD[kind]
        cut = make(tmp_path)
        with pytest.raises(AudioError) as caught:
            read(cut, normalize=normalize)
        message = str(caught.value)
        assert reason in message
        assert "\n" not in message and "torchaudio" not in message

    @pytest.mark.parametrize("kind", ["missing", "text", "silence", "another rate"])
    def test_a_crop_of_it_is_refused_too(self, kind: str, tmp_path: Path) -> None:
        make, reason = BAD[kind]
        with pytest.raises(AudioError, match=reason):
            read(make(tmp_path), offset=4_000, length=20_000)

    def test_a_duration_that_differs_by_rounding_is_accepted_and_padded(self, tmp_path: Path) -> None:
        cut = _wav(tmp_path, noise(3.0))
        longer = _with(cut, num_samples=48_010, duration=48_010 / RATE)
        assert read(longer).shape == (48_010,)
