"""LayerNorm of bf16 values without copies in fp32: statistics are fp32 inside PyTorch's own kernels.

Replaces `layer_norm`, which computes in fp32 and rounds. On CPUs PyTorch adds up the gradients of weight and bias in
bf16, and such a sum over frames soon stands still: these two are computed here. Held to the plain version by
tests/kernels/test_layer_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.kernels.precision import cast


def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `w2vscale.models.layers.layer_norm`; for GPUs, whose kernel sums in fp32."""
    return F.layer_norm(x, x.shape[-1:], cast(weight, x.dtype), cast(bias, x.dtype), eps)


def bf16_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `w2vscale.models.layers.layer_norm`; for CPUs."""
    if x.dtype != torch.bfloat16:
        return NotImplemented
    return _Bf16LayerNorm.apply(x, weight, bias, eps)


class _Bf16LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # With weights in bf16, mean and deviation would be returned in bf16, too.
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
