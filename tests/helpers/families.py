"""Tiny models of each kind of architecture, and micro-batches for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.config import ModelConfig, load_config
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.objectives.contrastive_model import LossSums, Wav2Vec2ForPretraining

CPU = torch.device("cpu")
SMALL = (
    "model.conv_layers=[[32,10,5],[32,3,2],[32,3,2],[32,2,2]]",
    "model.conv_norm_groups=32",
    "model.layers=3",
    "model.dim=48",
    "model.ffn_dim=64",
    "model.heads=4",
    "model.positional_kernel=16",
    "model.positional_groups=4",
    "model.dropout=0",
    "model.attention_dropout=0",
    "model.input_dropout=0",
    "model.feature_dropout=0",
    "model.layerdrop=0",
    "model.codebook_entries=20",
    "model.codevector_dim=24",
    "model.projection_dim=24",
    "model.negatives=20",
)
FAMILIES = {
    "base": ("base", SMALL),
    "large_lv60": ("large_lv60", SMALL),
    "base_prenorm": ("base_prenorm", (*SMALL, "model.conv_norm_groups=8")),
    # A layer without padding before one with padding.
    "padded, even kernels": (
        "base_prenorm",
        (*SMALL, "model.conv_layers=[[32,10,5],[32,2,2],[32,3,2],[32,2,1],[32,5,2]]"),
    ),
}
"""Preset and overrides: post-LN with GroupNorm, pre-LN with LayerNorm everywhere, padded convolutions."""


def family(name: str, *overrides: str) -> ModelConfig:
    """The settings of a family's tiny model, without dropout."""
    preset, settings = FAMILIES[name]
    return load_config(preset, (*settings, *overrides)).model


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Wav2Vec2ForPretraining:
    """A model without zero biases and unit scales."""
    torch.manual_seed(1)
    model = Wav2Vec2ForPretraining(config, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def noise(*samples: int, seed: int = 0) -> list[NDArray[np.float32]]:
    """Waveforms of so many samples."""
    draws = np.random.default_rng(seed)
    return [draws.standard_normal(size, dtype=np.float32) for size in samples]


def batch(config: ModelConfig, *samples: int, number: int = 0) -> MicroBatch:
    """A micro-batch of noise."""
    waveforms = noise(*samples, seed=number)
    inputs = make_inputs(waveforms, range(len(samples)), number=number, seed=5, config=config)
    return MicroBatch(update=0, number=number, inputs=inputs, audio_samples=sum(samples))


def gradients(model: Wav2Vec2ForPretraining, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def assert_close_sums(actual: LossSums, expected: LossSums) -> None:
    """Equal but for rounding."""
    for name, left, right in zip(LossSums._fields, actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
