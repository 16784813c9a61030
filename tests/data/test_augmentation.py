"""Speed, reverberation and noise change training audio as requested, and follow from the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from tests.helpers.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.batches import config_with
from w2vscale.config import Config
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.models.lengths import input_samples
from w2vscale.objectives import build_objective
from w2vscale.training.run import open_data, open_training_set

RATE = 16_000


def augmentation(config: Config) -> Augmentation:
    return Augmentation(config.augment, sampling_rate=RATE, shortest=shortest_samples(config), seed=config.trainer.seed)


def shortest_samples(config: Config) -> int:
    return input_samples(build_objective(config).shortest_frames, config.model)


def window_of(config: Config) -> list[MicroBatch]:
    """The first window that a run trains on."""
    training_set = open_training_set(config, build_objective(config))
    return next(training_set.windows(range(1), micro_batches=2, rank=0, world_size=1))


@pytest.fixture(scope="module")
def hum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of 4 kHz, as a noise."""
    folder = tmp_path_factory.mktemp("hum")
    return write_manifest(folder / "cuts.jsonl", [cut_of(write_audio(folder / "hum.flac", tone(1.0, 4000.0)))])


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An impulse response: the sound itself, and half as loud after 0.1 seconds."""
    folder = tmp_path_factory.mktemp("echo")
    response = np.zeros(RATE // 5, np.float32)
    response[0], response[1600] = 0.9, 0.45
    return write_manifest(folder / "cuts.jsonl", [cut_of(write_audio(folder / "echo.wav", response))])


def power_at(audio: NDArray[np.float32], hertz: float) -> float:
    """Share of the power within 30 Hz of a frequency."""
    spectrum = np.abs(np.fft.rfft(audio)) ** 2
    near = np.abs(np.fft.rfftfreq(audio.size, 1 / RATE) - hertz) < 30
    return float(spectrum[near].sum() / spectrum.sum())


class TestSpeed:
    def test_a_faster_utterance_is_shorter_and_higher(self) -> None:
        augment = augmentation(config_with("augment.speed=[1.25]"))
        audio, bad = augment(tone(2.0, 1000.0), number=0, place=0)
        assert (audio.size, bad) == (25_600, [])
        assert power_at(audio, 1250.0) > 0.9

    def test_a_slower_utterance_is_cropped_to_its_planned_length(self) -> None:
        augment = augmentation(config_with("augment.speed=[0.8]"))
        audio, _ = augment(tone(2.0, 1000.0), number=0, place=0)
        assert audio.size == 32_000
        assert power_at(audio, 800.0) > 0.9

    def test_an_utterance_that_would_become_too_short_stays(self) -> None:
        config = config_with("augment.speed=[2.0]")
        audio = tone(1.0, 500.0)[: shortest_samples(config) + 10]
        assert np.array_equal(augmentation(config)(audio, number=0, place=0)[0], audio)

    def test_each_factor_is_drawn(self) -> None:
        augment = augmentation(config_with("augment.speed=[0.9,1.0,1.1]"))
        sizes = [augment(tone(2.0, 300.0), number=number, place=1)[0].size for number in range(60)]
        whole = [size == 32_000 for size in sizes]
        assert 25 < sum(whole) < 55  # of 0.9 and 1.0


class TestNoise:
    def test_it_has_the_requested_signal_to_noise_ratio(self, hum: Path) -> None:
        speech = noise(2.5)
        for ratio in (0.0, 10.0, 20.0):
            settings = (f"augment.noise={hum}", "augment.noise_probability=1", f"augment.noise_snr=[{ratio},{ratio}]")
            audio, _ = augmentation(config_with(*settings))(speech, number=0, place=0)
            added = audio - speech
            measured = 10 * np.log10(np.square(speech).mean() / np.square(added).mean())
            assert measured == pytest.approx(ratio, abs=0.2)
            assert power_at(added, 4000.0) > 0.9

    def test_it_is_added_with_the_requested_probability(self, hum: Path) -> None:
        augment = augmentation(config_with(f"augment.noise={hum}", "augment.noise_probability=0.25"))
        speech = noise(1.0)
        changed = [not np.array_equal(augment(speech, number=n, place=0)[0], speech) for n in range(200)]
        assert 30 < sum(changed) < 70

    def test_a_noise_that_cannot_be_read_is_reported_and_the_utterance_stays(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "n.flac", noise(1.0))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
        write_text(path)
        augment = augmentation(config_with(f"augment.noise={manifest}", "augment.noise_probability=1"))
        audio, bad = augment(noise(1.5), number=0, place=0)
        assert np.array_equal(audio, noise(1.5))
        assert [(one.utterance, one.file, one.kind) for one in bad] == [("n", str(path), "undecodable")]


class TestReverberation:
    @pytest.mark.parametrize("rate", [16_000, 48_000])
    def test_the_echo_is_there(self, rate: int, tmp_path: Path) -> None:
        response = np.zeros(rate // 5, np.float32)
        response[0], response[rate // 10] = 0.9, 0.45
        echo = write_manifest(tmp_path / "e.jsonl", [cut_of(write_audio(tmp_path / "e.wav", response, rate=rate))])
        augment = augmentation(config_with(f"augment.reverb={echo}", "augment.reverb_probability=1"))
        click = np.zeros(RATE, np.float32)
        click[2000] = 0.5
        audio, _ = augment(click, number=0, place=0)
        assert audio.size == RATE
        loud = np.flatnonzero(np.abs(audio) > 0.3 * np.abs(audio).max())
        assert loud[-1] - loud[0] == pytest.approx(1600, abs=2)

    def test_a_response_that_cannot_be_read_is_reported_and_the_utterance_stays(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "r.wav", noise(0.2))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
        path.unlink()
        augment = augmentation(config_with(f"augment.reverb={manifest}", "augment.reverb_probability=1"))
        audio, bad = augment(noise(1.5), number=0, place=0)
        assert np.array_equal(audio, noise(1.5))
        (one,) = bad
        assert (one.utterance, one.file) == ("r", str(path)) and "\n" not in one.reason


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_silent_or_not_finite_response_is_reported_and_the_utterance_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "r.wav"
    soundfile.write(path, np.full(2000, value, np.float32), RATE, subtype="FLOAT")
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
    augment = augmentation(config_with(f"augment.reverb={manifest}", "augment.reverb_probability=1"))
    audio, bad = augment(noise(1.5), number=0, place=0)
    assert np.array_equal(audio, noise(1.5))
    assert [(one.utterance, one.left_out) for one in bad] == [("r", False)]


def test_the_draws_of_one_setting_do_not_depend_on_another(hum: Path, echo: Path) -> None:
    level = ("augment.noise_probability=0.5", "augment.noise_snr=[0,0]", f"augment.noise={hum}")
    with_echo = augmentation(config_with(*level, f"augment.reverb={echo}", "augment.reverb_probability=0"))
    without = augmentation(config_with(*level))
    speech = noise(1.5)
    for number in range(6):
        audio = [augment(speech, number=number, place=0)[0] for augment in (with_echo, without)]
        assert np.array_equal(*audio)


def test_draws_follow_from_seed_micro_batch_and_place(hum: Path, echo: Path) -> None:
    settings = ("augment.speed=[0.9,1.1]", f"augment.noise={hum}", f"augment.reverb={echo}")
    one, other = augmentation(config_with(*settings)), augmentation(config_with(*settings))
    speech = noise(2.0)
    again = [augment(speech, number=4, place=2)[0] for augment in (one, other)]
    assert np.array_equal(*again)
    variants = [one(speech, number=number, place=place)[0] for number in range(3) for place in range(3)]
    assert len({variant.tobytes() for variant in variants}) > 5
    seeded = augmentation(config_with(*settings, "trainer.seed=1"))
    assert any(
        not np.array_equal(seeded(speech, number=n, place=0)[0], one(speech, number=n, place=0)[0]) for n in range(5)
    )


def test_training_is_augmented_and_validation_is_not(small_corpus: SmallCorpus, hum: Path) -> None:
    paths = (f"data.train={small_corpus.train}", f"data.validation={small_corpus.train}")
    noisy = ("augment.speed=[1.1]", f"augment.noise={hum}", "augment.noise_probability=1")
    objective = build_objective(config_with())
    (_, validation), (_, plain) = (open_data(config_with(*paths, *more), objective, Ranks()) for more in (noisy, ()))
    assert validation is not None and plain is not None
    assert torch.equal(validation[0].inputs.audio.waveforms_BS, plain[0].inputs.audio.waveforms_BS)
    window, clean = window_of(config_with(*paths, *noisy)), window_of(config_with(*paths))
    assert [batch.number for batch in window] == [batch.number for batch in clean]
    assert all(dirty.audio_samples < was.audio_samples for dirty, was in zip(window, clean, strict=True))


def test_normalised_audio_is_normalised_after_augmentation(small_corpus: SmallCorpus, hum: Path) -> None:
    settings = (f"augment.noise={hum}", "augment.noise_probability=1", "augment.noise_snr=[0,0]")
    config = config_with(f"data.train={small_corpus.train}", *settings, "model.normalize_waveform=true")
    audio = window_of(config)[0].inputs.audio
    for row, length in zip(audio.waveforms_BS, audio.lengths_B, strict=True):
        assert row[:length].mean().abs() < 1e-4
        assert row[:length].std() == pytest.approx(1.0, abs=1e-3)


def test_audio_that_was_not_augmented_is_normalised_as_usual(small_corpus: SmallCorpus, hum: Path) -> None:
    cropped = (f"data.train={small_corpus.train}", "data.max_seconds=2", "model.normalize_waveform=true")
    never = (f"augment.noise={hum}", "augment.noise_probability=0", "augment.speed=[1.0]")
    batch, plain = (window_of(config_with(*cropped, *more))[0].inputs.audio for more in ((), never))
    assert torch.equal(batch.waveforms_BS, plain.waveforms_BS)


def test_a_missing_manifest_is_an_error_that_names_it(tmp_path: Path) -> None:
    for setting in ("augment.noise", "augment.reverb"):
        with pytest.raises(UserError, match=r"none\.jsonl: no such manifest"):
            augmentation(config_with(f"{setting}={tmp_path / 'none.jsonl'}"))


def test_levels_in_the_wrong_order_are_an_error() -> None:
    with pytest.raises(UserError, match=r"noise_snr=\[20.0, 10.0\]: the first value is above the second"):
        config_with("augment.noise_snr=[20,10]")
