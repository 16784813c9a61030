"""Load a model and compute its features: equal to those of Transformers, from every kind of array."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import w2vscale
from tests.helpers.audio import noise, write_text
from tests.helpers.converted import to_huggingface
from tests.helpers.pretrained import difference, micro_pretrained
from w2vscale.data.audio import standardize
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.interop.huggingface import huggingface_config
from w2vscale.models.lengths import output_frames


def test_load_opens_runs_and_checkpoints(run: Path) -> None:
    loaded = w2vscale.load(run)
    assert isinstance(loaded, w2vscale.Pretrained)
    assert not loaded.model.training
    assert loaded.config.model.layers == 3
    waveform = noise(1.0)
    first = loaded.features(waveform, 16_000)
    (checkpoint,) = (run / "checkpoints").glob("update_*")
    assert difference(first, load(str(checkpoint), device="cpu").features(waveform, 16_000)) == [0.0] * 4
    with pytest.raises(UserError, match="no such checkpoint"):
        load(run / "absent")
    write_text(run / "other" / "config.json")
    model = write_text(run / "model.pt")
    for path in (run / "other", model):
        with pytest.raises(UserError, match=f"; .*: w2vscale import {path} DIR$"):
            load(path)
    with pytest.raises(UserError, match=r"no such checkpoint$"):
        load(write_text(run / "notes.txt"))
    with pytest.raises(UserError, match="device cudda: "):
        load(run, device="cudda")
    with pytest.raises(AttributeError, match="laod"):
        w2vscale.laod  # noqa: B018


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_layers_are_transformers_hidden_states(preset: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = micro_pretrained(preset)
    config = ours.config
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config))).eval()
    theirs.load_state_dict(to_huggingface(ours.model.state_dict(), config))
    waveform = noise(2.0)
    given = standardize(waveform) if config.model.normalize_waveform else waveform
    with torch.no_grad():
        output: Any = theirs(torch.from_numpy(given).unsqueeze(0), output_hidden_states=True)
        encoded: Any = theirs.wav2vec2(torch.from_numpy(given).unsqueeze(0))
    found = ours.features(waveform, 16_000)
    assert max(difference(found, {n: h[0] for n, h in enumerate(output.hidden_states)})) <= 1e-5
    norm = ours.model.encoder.transformer.final_norm
    last = found[config.model.layers] if norm is None else norm(found[config.model.layers])
    assert difference({0: last}, {0: encoded.last_hidden_state[0]})[0] <= 1e-5


def test_waveforms_are_normalised_with_the_constant_of_the_model() -> None:
    model = micro_pretrained("fairseq_large_lv60")
    quiet = 0.003 * noise(1.0)
    given = torch.nn.functional.layer_norm(torch.from_numpy(quiet), quiet.shape)
    with torch.no_grad():
        expected = {n: h[0] for n, h in enumerate(model.model.encoder(given.unsqueeze(0)).hidden)}
    found = model.features(quiet, 16_000)
    assert max(difference(found, expected)) <= 1e-5
    assert max(difference(micro_pretrained("large_lv60").features(quiet, 16_000), expected)) > 1e-3


def test_a_choice_of_layers() -> None:
    model = micro_pretrained("base")
    waveform = noise(1.0)
    every = model.features(waveform, 16_000)
    some = model.features(waveform, 16_000, layers=[2, 0, 2])
    assert list(some) == [0, 2]
    assert difference(some, {layer: every[layer] for layer in some}) == [0.0, 0.0]
    several: tuple[Any, ...] = (2, np.int64(2))
    for one in several:
        assert difference(model.features(waveform, 16_000, layers=one), {2: every[2]}) == [0.0]


def test_any_array_of_samples() -> None:
    model = micro_pretrained("base")
    waveform = noise(1.0)
    expected = model.features(waveform, 16_000)
    stereo = np.stack([0.5 * waveform, 1.5 * waveform])
    tensor = torch.from_numpy(waveform)
    fixed = waveform.copy()
    fixed.flags.writeable = False
    same: tuple[Any, ...] = (
        tensor, tensor.clone().requires_grad_(), waveform.astype(np.float64), waveform[None], stereo,
        waveform[::-1].copy()[::-1], waveform.astype(">f4"), waveform.repeat(2)[::2], fixed, waveform.tolist(),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in same:
            assert max(difference(expected, model.features(other, 16_000))) <= 1e-5
        assert max(difference(expected, model.features(waveform, np.int16(16_000)))) <= 1e-5  # type: ignore[arg-type]
        model.features(tensor.bfloat16(), 16_000)


@pytest.mark.parametrize("rate", [0, -16_000, 999, 500_001])
def test_absurd_sampling_rates_are_refused(rate: int) -> None:
    with pytest.raises(UserError, match=f"waveform: sampling rate is {rate} Hz, not a whole number from 1,000"):
        micro_pretrained("base").features(noise(1.0), rate)


@pytest.mark.parametrize("rate", [16_000.0, "16000", None])
def test_a_rate_is_a_whole_number(rate: Any) -> None:
    with pytest.raises(UserError, match=f"sampling_rate={rate!r}: expected a whole number"):
        micro_pretrained("base").features(noise(1.0), rate)


@pytest.mark.parametrize(
    ("waveform", "options", "message"),
    [
        (np.zeros(16_000, np.int16), {}, "int16: expected floating point from -1 to 1; divide int16 by 32768"),
        (torch.zeros(16_000, dtype=torch.int16), {}, "divide int16 by 32768"),
        (np.zeros(16_000, bool), {}, "bool: expected floating point"),
        (np.zeros(16_000, np.complex64), {}, "complex64: expected floating point"),
        (np.full(16_000, "0.5"), {}, "<U3: expected floating point"),
        (None, {}, "object: expected floating point"),
        ([[0.0, 0.5], [0.5]], {}, "its rows differ in length"),
        (0.5, {}, r"shape \[\]: expected"),
        (np.zeros((0, 16_000), np.float32), {}, r"shape \[0, 16000\]: expected"),
        (np.zeros((16_000, 2), np.float32), {}, r"shape \[16000, 2\]: expected"),
        (np.full(16_000, np.nan, np.float32), {}, "not finite"),
        (np.zeros(399, np.float32), {}, "has 399 samples, fewer than the 400 of one frame"),
        (np.zeros(0, np.float32), {}, "has 0 samples"),
        (np.zeros(16_000, np.float32), {"layers": [4]}, "layer 4: the model has layers 0 to 3"),
        (np.zeros(16_000, np.float32), {"layers": -1}, "layer -1: the model has layers 0 to 3"),
        (np.zeros(16_000, np.float32), {"layers": []}, "layers: empty"),
        (np.zeros(16_000, np.float32), {"layers": "12"}, "layers='12': expected whole numbers from 0 to 3"),
        (np.zeros(16_000, np.float32), {"layers": 1.0}, "layers=1.0: expected whole numbers"),
        (np.zeros(16_000, np.float32), {"chunk_seconds": 0}, "chunk_seconds=0: must be above 0"),
        (np.zeros(16_000, np.float32), {"overlap_seconds": -1.0}, "overlap_seconds=-1.0: must be at least 0"),
    ],
)
def test_mistakes(waveform: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        micro_pretrained("base").features(waveform, 16_000, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["base", "base_prenorm"])
def test_more_frames_than_the_model_takes(preset: str) -> None:
    model = micro_pretrained(preset, "model.max_frames=100")
    found = model.features(noise(3.0), 16_000, overlap_seconds=0.5)
    assert difference(found, model.features(noise(3.0), 16_000, chunk_seconds=1.0, overlap_seconds=0.5)) == [0.0] * 4
    assert found[0].shape == (output_frames(48_000, model.config.model), 32)
    with pytest.raises(UserError, match=r"50 frames of context on either side leave no room .* model.max_frames=100"):
        model.features(noise(3.0), 16_000, overlap_seconds=1.0)
