"""Linear, LayerNorm and dropout.

Parameters are kept in fp32 and cast to the input's type where they are used: the type of the waveforms decides in which
type a model computes. Each module's `reset_parameters` draws the initial values of its own parameters (not those of its
children), so that a model can be built on the meta device and filled module by module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import PrecisionConfig
from w2vscale.kernels.precision import widen
from w2vscale.kernels.replaceable import replaceable


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The type of activations and matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute]


class Linear(nn.Linear):
    """nn.Linear in the type of the input. With `std`, weights start from N(0, std) and biases from 0."""

    def __init__(self, inputs: int, outputs: int, *, std: float | None = None) -> None:
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        if self.std is None:
            super().reset_parameters()
        else:
            nn.init.normal_(self.weight, std=self.std)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016) over the last dimension, computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@replaceable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension in fp32, rounded to the type of `x`.

    In bf16 the sums over frames, which are the gradients of `weight` and `bias`, would soon stand still.
    """
    return F.layer_norm(widen(x), x.shape[-1:], widen(weight), widen(bias), eps).to(x.dtype)


@replaceable
def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with `probability` and scale the others by 1 / (1 - probability), in training alone."""
    return F.dropout(x, probability, training)
