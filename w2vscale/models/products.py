"""Matrix products in bf16, also where the processor has none.

There PyTorch's own are 9 to 70 times slower than its products in fp32. Here they are fp32 products of bf16 values,
rounded: what processors with bf16 compute, too (but for a bias, which they add before they round).
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _cpu_has_bf16() -> bool:
    # This follows ONEDNN_MAX_CPU_ISA, but on x86-64 any processor with AVX-512 passes: there oneDNN emulates bf16.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


CPU_HAS_BF16 = _cpu_has_bf16()
"""Whether products in bf16 have instructions of their own on this processor."""


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (widened(a) @ widened(b)).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        gradient = widened(gradients[0])
        of_a = (gradient @ widened(b).mT).to(a.dtype) if ctx.needs_input_grad[0] else None
        of_b = (widened(a).mT @ gradient).to(b.dtype) if ctx.needs_input_grad[1] else None
        return of_a, of_b


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, of the same batch dimensions."""
    return _WideProduct.apply(a, b) if is_emulated(a) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    if not is_emulated(x):
        return F.linear(x, weight, bias)
    y = matmul(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def widened(x: Tensor) -> Tensor:
    """`x`, in fp32 where products of it would be emulated."""
    return x.float() if is_emulated(x) else x


def is_emulated(x: Tensor) -> bool:
    """Whether products of `x` are bf16 on a processor without it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_HAS_BF16
