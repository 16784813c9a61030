"""Linear and LayerNorm that compute in their input's type, whatever type their weights are kept in; dropout.

Here and in the other modules `reset_parameters` draws the initial values of a module's own parameters (not those of
its children), so that a model can be built without memory and filled module by module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import PrecisionConfig
from w2vscale.models.products import linear


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
        return linear(x, self.weight.to(x.dtype), bias)


class _Bf16LayerNorm(torch.autograd.Function):
    """For CPUs: there PyTorch adds up the gradients of weight and bias in bf16, and such a sum over frames soon stands
    still."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # With weights in bf16, mean and deviation would be given in bf16, too.
        y, mean, reciprocal = torch.native_layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, mean, reciprocal)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, reciprocal = ctx.saved_tensors
        of_x = torch.ops.aten.native_layer_norm_backward(
            gradients[0], x, x.shape[-1:], mean, reciprocal, weight.float(), bias.float(), [True, False, False]
        )[0]
        gradient = gradients[0].float()
        of_weight = (gradient * ((x.float() - mean) * reciprocal)).view(-1, x.shape[-1]).sum(dim=0)
        of_bias = gradient.view(-1, x.shape[-1]).sum(dim=0)
        return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, with weights cast to the input's type; statistics and sums over frames are fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Bf16LayerNorm.apply(x, weight, bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, factor: float) -> Tensor:
        """Zeros for `dropped` of 2^16 elements; the others are multiplied by `factor`."""
        ctx.factor = factor
        # The seed comes from PyTorch's generator, so that what repeats there repeats here.
        draws = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
        bits = draws.integers(2**64, size=-(-x.numel() // 4), dtype=np.uint64).view(np.int16)
        kept = torch.from_numpy(bits)[: x.numel()].view(x.shape) >= dropped - 2**15
        ctx.save_for_backward(kept)
        return _scaled(torch.where(kept, x, 0.0), factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(torch.where(kept, gradients[0], 0.0), ctx.factor), None, None


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """`F.dropout`, on CPUs with 16 random bits for each element: PyTorch draws a double for it, in one thread."""
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    dropped, factor = _sixteen_bits(probability)
    return _Dropout.apply(x, dropped, factor)


def unscaled_dropout(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Dropout in training without the factor of what is kept, and that factor: it costs less elsewhere."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability), 1.0
    dropped, factor = _sixteen_bits(probability)
    return _Dropout.apply(x, dropped, 1.0), factor


def _sixteen_bits(probability: float) -> tuple[int, float]:
    """How many of 2^16 are dropped, and the factor of what is kept."""
    dropped = min(round(probability * 2**16), 2**16 - 1)
    return dropped, 2**16 / (2**16 - dropped)
