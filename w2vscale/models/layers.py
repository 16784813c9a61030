"""Linear and LayerNorm that compute in their input's type, whatever type their weights are kept in.

Here and in the other modules `reset_parameters` draws the initial values of a module's own parameters (not those of
its children), so that a model can be built without memory and filled module by module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import PrecisionConfig


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The type of activations and matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute]


class Linear(nn.Linear):
    """nn.Linear, with weights cast to the input's type: fp32 masters compute in bf16 where the input is bf16.

    With `std`, weights start from N(0, std) and biases from 0; otherwise as PyTorch's.
    """

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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, with weights cast to the input's type; PyTorch takes the statistics in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
