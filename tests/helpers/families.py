"""Tiny models of each published architecture for wav2vec 2.0 pretraining, and micro-batches for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.helpers.batches import inputs_of
from tests.helpers.micro import SMALL
from w2vscale.config import load_config
from w2vscale.data.inputs import join
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.contrastive import Contrastive, ContrastiveInputs, ContrastiveSums, Wav2Vec2ForPretraining

TINY = (
    *SMALL,
    "regularization.dropout=0",
    "regularization.attention_dropout=0",
    "regularization.input_dropout=0",
    "regularization.layerdrop=0",
    "objective.feature_dropout=0",
    "precision.compute=fp32",
)
FAMILIES = {
    "base": ("base", TINY),
    "large_lv60": ("large_lv60", TINY),
    "base_prenorm": ("base_prenorm", (*TINY, "model.conv_norm_groups=8")),
    # A layer without padding before one with padding.
    "padded, even kernels": (
        "base_prenorm",
        (*TINY, "model.conv_layers=[[32,10,5],[32,2,2],[32,3,2],[32,2,1],[32,5,2]]"),
    ),
}
"""Preset and overrides: post-LN with GroupNorm, pre-LN with LayerNorm everywhere, padded convolutions."""


def family(name: str, *overrides: str) -> Contrastive:
    """The objective of a family with a tiny encoder, without dropout, in fp32."""
    preset, settings = FAMILIES[name]
    objective = build_objective(load_config(preset, (*settings, *overrides)))
    assert isinstance(objective, Contrastive)
    return objective


def build(objective: Contrastive) -> Wav2Vec2ForPretraining:
    """A model with random weights, without zero biases and unit scales."""
    torch.manual_seed(1)
    model = objective.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def noise(*samples: int, seed: int = 0) -> list[NDArray[np.float32]]:
    """White noise, one waveform for each number of samples."""
    draws = np.random.default_rng(seed)
    return [draws.standard_normal(size, dtype=np.float32) for size in samples]


def batch(objective: Contrastive, *samples: int, number: int = 0) -> ContrastiveInputs:
    """Micro-batch `number`, of noise."""
    inputs: ContrastiveInputs = inputs_of(objective, noise(*samples, seed=number), number=number, seed=5)
    return inputs


def sums_of(
    objective: Contrastive,
    model: Wav2Vec2ForPretraining,
    *parts: ContrastiveInputs,
    numbers: tuple[int, ...] = (0,),
    seed: int = 4,
) -> ContrastiveSums:
    """The sums of one forward of these micro-batches, in training if the model is in training mode."""
    step = StepContext(seed, update=0, numbers=numbers)
    return objective.forward(model, join(parts), step=step, training=model.training)


def gradients(model: Wav2Vec2ForPretraining, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def valid_frames(inputs: ContrastiveInputs) -> Tensor:
    """[B, T] bool: True inside each utterance."""
    return torch.arange(inputs.audio.mask_BT.shape[1]) < inputs.audio.frames_B.unsqueeze(1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def assert_close_sums(actual: ContrastiveSums, expected: ContrastiveSums) -> None:
    """Equal except for rounding."""
    for name, left, right in zip(ContrastiveSums._fields, actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal except for rounding, as a share of the norm of each gradient."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Not of the largest value: gradients through a softmax may cancel to almost nothing.
        assert float((actual[name] - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), 1e-3), name
