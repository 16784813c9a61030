"""What kernels and models say about floating-point types: fp32 islands, autocast, and bf16 on CPUs."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
WITH_AUTOCAST = frozenset(device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device))


def widen(x: Tensor) -> Tensor:
    """`x` in fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`: the copy that `models.layers.weights_cast_once` has made, if any."""
    copy: Tensor | None = getattr(parameter, "cast_copy", None)
    if copy is None or copy.dtype != dtype:
        return parameter.to(dtype)
    y: Tensor = _UseCopy.apply(parameter, copy)
    return y


class _UseCopy(torch.autograd.Function):
    """The copy of a parameter, whose gradient goes to the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from changing the types of what is computed on the device of `x`."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in WITH_AUTOCAST else nullcontext()


def _cpu_has_bf16() -> bool:
    # This follows ONEDNN_MAX_CPU_ISA, but on x86-64 any processor with AVX-512 passes: there oneDNN emulates bf16.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


CPU_HAS_BF16 = _cpu_has_bf16()
"""Whether the processor has instructions for products in bf16; without them bf16 is slower than fp32."""
