"""A small model with random weights to run on audio, and the comparison of its features."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.inference.pretrained import Pretrained
from w2vscale.objectives import resolve


def micro_pretrained(preset: str, *overrides: str) -> Pretrained:
    """A model with random weights, computing in fp32."""
    config, objective = resolve(load_config(preset, [*MICRO_MODEL, "precision.compute=fp32", *overrides]))
    torch.manual_seed(7)
    model = objective.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Pretrained(model, config, objective)


def difference(a: dict[int, Tensor], b: dict[int, Tensor]) -> list[float]:
    """The largest difference in each layer, relative to the largest value of `b`."""
    assert a.keys() == b.keys()
    assert all(a[layer].shape == b[layer].shape and a[layer].dtype == torch.float32 for layer in a)
    return [float((a[layer] - b[layer]).abs().max() / b[layer].abs().max()) for layer in a]
