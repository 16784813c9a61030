"""Dropout from 16 random bits per element.

Replaces `dropout` on CPUs, where PyTorch draws a double per element, in one thread: 0.9 in place of 2.1 s of a step of
`base` (docs/lab). The share that is dropped is a multiple of 2^-16. Held to the plain version, in distribution, by
tests/kernels/test_dropout.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sixteen_bit_dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """See `w2vscale.models.layers.dropout`."""
    if not training or probability == 0.0:
        return x
    dropped, factor = _sixteen_bits(probability)
    return _Dropout.apply(x, dropped, factor)


def unscaled_dropout(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Dropout in training without the factor of what is kept, and that factor: it costs less elsewhere."""
    dropped, factor = _sixteen_bits(probability)
    return _Dropout.apply(x, dropped, 1.0), factor


@torch.library.custom_op("w2vscale::kept_in_dropout", mutates_args=())
def _kept(shape: list[int], dropped: int) -> Tensor:
    """Draw what is kept: False for `dropped` of 2^16 elements. A custom operator, so that fake tensors pass."""
    # The seed comes from PyTorch's generator, so that what repeats there repeats here.
    draws = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
    count = math.prod(shape)
    bits = draws.integers(2**64, size=-(-count // 4), dtype=np.uint64).view(np.int16)
    return torch.from_numpy(bits)[:count].view(shape) >= dropped - 2**15


@_kept.register_fake
def _(shape: list[int], dropped: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, factor: float) -> Tensor:
        """Zeros for `dropped` of 2^16 elements; the others are multiplied by `factor`."""
        ctx.factor = factor
        kept = _kept(x.shape, dropped)
        ctx.save_for_backward(kept)
        return _scaled(torch.where(kept, x, 0.0), factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(torch.where(kept, gradients[0], 0.0), ctx.factor), None, None


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def _sixteen_bits(probability: float) -> tuple[int, float]:
    """How many of 2^16 are dropped, and the factor of what is kept."""
    dropped = min(round(probability * 2**16), 2**16 - 1)
    return dropped, 2**16 / (2**16 - dropped)
