"""`--channel` of prepare, transcribe and features: one channel or the mean, the same audio for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import MonoCut

from tests.helpers.audio import noise, write_audio
from tests.helpers.commands import error_of
from tests.helpers.exported import random_model, save_model
from tests.helpers.spelled import SPELLING, spoken
from w2vscale.checkpoint.format import TrainState
from w2vscale.config import load_config
from w2vscale.data.audio import read_audio

CHANNELS = {"mean": None, "first": 0, "1": 1}
RATE = 16_000


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stereo file."""
    folder = tmp_path_factory.mktemp("stereo") / "audio"
    left, right = (spoken(text, seed=seed) for seed, text in enumerate(["ABCD CDA DCB", "DCAB DBA ACB"]))
    write_audio(folder / "stereo.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    config = load_config("base", [*SPELLING, "precision.compute=fp32"])
    save_model(folder, config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    return folder


def samples(audio: Path, channel: int | None) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    import soundfile

    both = soundfile.read(audio / "stereo.wav", dtype="float32")[0]
    found: np.ndarray[tuple[int], np.dtype[np.float32]] = both.mean(axis=1) if channel is None else both[:, channel]
    return found


@pytest.mark.parametrize("name", CHANNELS)
def test_prepare(name: str, audio: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("data", "prepare", "folder", audio, tmp_path, "--channel", name)
    (cut,) = CutSet.from_file(tmp_path / "cuts_train.jsonl")
    channel = CHANNELS[name]
    assert cut.supervisions[0].channel == cut.channel == ([0, 1] if channel is None else channel)
    assert isinstance(cut, MonoCut) == (channel is not None)
    expected = samples(audio, channel)
    np.testing.assert_allclose(read_audio(cut, sampling_rate=RATE), expected, atol=1e-7)
    crop = read_audio(cut, sampling_rate=RATE, offset=777, length=9_000)
    np.testing.assert_allclose(crop, expected[777:9_777], atol=1e-7)
    assert run("data", "validate", tmp_path / "cuts_train.jsonl", "--audio").endswith(
        "no problem found in 1 utterance\n"
    )


@pytest.mark.parametrize("name", CHANNELS)
def test_prepare_in_segments(name: str, audio: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("data", "prepare", "folder", audio, tmp_path, "--channel", name, "--segment-seconds", "0.5")
    cuts = sorted(CutSet.from_file(tmp_path / "cuts_train.jsonl"), key=lambda cut: cut.start)
    assert len(cuts) == 3
    found = np.concatenate([read_audio(cut, sampling_rate=RATE) for cut in cuts])
    np.testing.assert_allclose(found, samples(audio, CHANNELS[name]), atol=1e-7)


@pytest.mark.parametrize("name", CHANNELS)
def test_transcribe_and_features(name: str, audio: Path, model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    mono = write_audio(tmp_path / "mono.wav", samples(audio, CHANNELS[name]), subtype="FLOAT")
    texts = [
        json.loads(run("transcribe", model, *given, "--format", "json"))["text"]
        for given in ((audio, "--channel", name), (mono,))
    ]
    assert texts[0] == texts[1]
    run("features", model, audio, "-o", tmp_path / "found", "--channel", name)
    run("features", model, mono, "-o", tmp_path / "expected")
    found, expected = np.load(tmp_path / "found" / "stereo.npy"), np.load(tmp_path / "expected" / "mono.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_mean_is_the_default(audio: Path, model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("data", "prepare", "folder", audio, tmp_path)
    (cut,) = CutSet.from_file(tmp_path / "cuts_train.jsonl")
    assert cut.channel == [0, 1]
    assert run("transcribe", model, audio) == run("transcribe", model, audio, "--channel", "mean")


@pytest.mark.parametrize("name", ["left", "-1", "1.5", "", "Mean", "0,1", "²", "1 "])
def test_wrong_values(name: str, audio: Path, model: Path, tmp_path: Path) -> None:
    message = f"--channel {name}: choose mean, first, or the number of a channel, counted from 0"
    assert error_of("data", "prepare", "folder", audio, tmp_path / "out", "--channel", name) == message
    assert error_of("transcribe", model, audio, "--channel", name) == message
    assert error_of("features", model, audio, "-o", tmp_path / "out", "--channel", name) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [2, 10**30])
def test_a_channel_that_a_file_lacks_is_named(
    number: int, model: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    stereo = write_audio(tmp_path / "audio" / "a.wav", np.stack([noise(1.0), noise(1.0)], axis=1))
    reason = f"has 2 channels, numbered from 0, and no channel {number}"
    for command in (
        ("transcribe", model, stereo), ("features", model, stereo, "-o", tmp_path / "features"),
        ("data", "prepare", "folder", stereo.parent, tmp_path / "none"),
    ):  # fmt: skip
        assert error_of(*command, "--channel", number).startswith(f"{stereo}: {reason}; ")
    if number == 2:
        write_audio(tmp_path / "audio" / "b.wav", np.stack([noise(1.0)] * 3, axis=1))
        printed = run("data", "prepare", "folder", stereo.parent, tmp_path / "out", "--channel", 2)
        assert "1 utterance, " in printed and f"left out: a.wav: {reason}" in printed


def test_channels_that_cancel_are_named_and_one_of_them_can_be_used(
    model: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    path = write_audio(tmp_path / "audio" / "a.wav", np.stack([noise(1.0), -noise(1.0)], axis=1))
    reason = "its channels cancel each other in the mean; use one of them, with --channel first"
    assert error_of("transcribe", model, path).startswith(f"{path}: {reason}; ")
    assert error_of("features", model, path, "-o", tmp_path / "features").startswith(f"{path}: {reason}; ")
    manifest = tmp_path / "out" / "cuts_train.jsonl"
    run("data", "prepare", "folder", path.parent, manifest.parent)
    assert error_of("data", "validate", manifest, "--audio").endswith(f"({path}): {reason}")
    (bad,) = map(json.loads, Path(f"{manifest}.bad_audio").read_text().splitlines())
    assert bad["kind"] == "cancelling"
    run("data", "prepare", "folder", path.parent, manifest.parent, "--channel", "first")
    assert "no problem found" in run("data", "validate", manifest, "--audio")
    assert run("transcribe", model, path, "--channel", "first").startswith("a\t")
