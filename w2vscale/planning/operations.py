"""Floating-point operations of single PyTorch operations, and the time that a device needs for them at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from w2vscale.kernels.table import KERNELS

assert KERNELS  # importing it registers the custom operators that are counted here

FP32_SHARE = 1 / 15
"""Rate of products in fp32 and fp64 as a share of that in bf16, on A100 and H100 (data sheets of NVIDIA)."""


class Speeds(NamedTuple):
    """What a device sustains per second: floating-point operations of bf16 matrix products, and bytes of memory."""

    flops: float
    bandwidth: float


def _baddbmm_flops(_: Any, a_shape: Sequence[int], b_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(a_shape) * b_shape[2]


def _convolution_backward_flops(
    gradient_shape: Sequence[int], _: Any, weight_shape: Sequence[int], *others: Any, **__: Any
) -> int:
    wanted = others[-1]
    return 2 * math.prod(gradient_shape) * math.prod(weight_shape[1:]) * sum(wanted[:2])


MISCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten.baddbmm_: _baddbmm_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
"""What the counter of PyTorch leaves out, and what it counts as if a convolution had one group."""


def _of_convolution(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> float:
    steps = (x_BTI.shape[1] - weight_OIK.shape[2]) // stride + 1
    return 2.0 * x_BTI.shape[0] * steps * weight_OIK.numel()


def _of_input_gradient(gradient_BTO: Tensor, weight_OIK: Tensor, length: int, stride: int) -> float:
    return 2.0 * math.prod(gradient_BTO.shape[:2]) * weight_OIK.numel()


def _of_weight_gradient(x_BTI: Tensor, gradient_BTO: Tensor, kernel: int, stride: int) -> float:
    return 2.0 * gradient_BTO.numel() * x_BTI.shape[2] * kernel


def _of_taps(taps_BTJ: Tensor) -> float:
    return 2.0 * taps_BTJ.numel() * taps_BTJ.shape[2]


def _of_attention(q_NHE: Tensor, k: Tensor, v: Tensor, bounds: Any, _: Any, steps: int, *others: Any) -> float:
    """Two products of all queries with the keys or values of an utterance."""
    return 2 * 2.0 * q_NHE.numel() * steps


def _of_attention_gradient(
    gradient: Tensor, q_NHE: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, bounds: Any, _: Any, steps: int,
    *others: Any,
) -> float:  # fmt: skip
    """Five products, since the weights are computed again (Dao 2023, arXiv:2307.08691)."""
    return 5 * 2.0 * q_NHE.numel() * steps


KERNEL_FLOPS: dict[Any, Callable[..., float]] = {
    torch.ops.w2vscale.strided_products: _of_convolution,
    torch.ops.w2vscale.strided_products_of_input: _of_input_gradient,
    torch.ops.w2vscale.strided_products_of_weight: _of_weight_gradient,
    torch.ops.w2vscale.products_of_taps: _of_taps,
    torch.ops.aten._flash_attention_forward: _of_attention,
    torch.ops.aten._flash_attention_backward: _of_attention_gradient,
}
"""Of custom operators, and of attention, whose counter reads the lengths, which fake tensors do not have."""


def flops_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> float:
    """Return the floating-point operations of one call; 0 where it has no products."""
    packet = function._overloadpacket
    if packet in KERNEL_FLOPS:
        return KERNEL_FLOPS[packet](*args)
    if packet in MISCOUNTED:
        return float(MISCOUNTED[packet](*(one.shape if isinstance(one, Tensor) else one for one in args)))
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def seconds_of(flops: float, tensors: Sequence[Tensor], speeds: Speeds) -> float:
    """Return the time of one call on a device: of its arithmetic, or of reading and writing all `tensors` once.

    The first tensor decides the type of the arithmetic. This is the roofline model (Williams et al. 2009).
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    wide = tensors[0].dtype in (torch.float32, torch.float64)
    return max(flops / (speeds.flops * (FP32_SHARE if wide else 1.0)), size / speeds.bandwidth)
