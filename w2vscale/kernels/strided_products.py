"""Strided convolutions with channels last, as matrix products on views of their input.

Replaces `strided_convolution`. A window of `stride` steps begins at every stride-th step, so windows lie behind each
other in memory: with kernel 3 and stride 2 the first two taps are one product on [T / 2, 2 I], the third is another on
every second step. No window is copied, no layout changes, and all arithmetic runs at the rate of matrix products: a
tenth of a training step on a CPU (docs/lab), 4.3 against 8.0 ms on an H100 (docs/performance.md). Held to the plain
version by tests/kernels/test_strided_convolution.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.kernels.precision import without_autocast
from w2vscale.kernels.taps import matrix_of, taps_of


def strided_products(x_BTI: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, stride: int) -> Tensor:
    """See `w2vscale.models.wav2vec2.strided_convolution`."""
    with without_autocast(x_BTI):
        if x_BTI.shape[2] == 1:
            taps_BTJ = taps_of(x_BTI.squeeze(2), weight_OIK.shape[2], stride)
            return F.linear(taps_BTJ, matrix_of(weight_OIK, bias_O, taps_BTJ.shape[2]).to(x_BTI.dtype))
        y_BTO: Tensor = _StridedConvolution.apply(x_BTI.contiguous(), weight_OIK.to(x_BTI.dtype), stride)
        return y_BTO if bias_O is None else y_BTO + bias_O.to(x_BTI.dtype)


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x_BTI, weight_OIK)
        ctx.stride = stride
        steps = (x_BTI.shape[1] - weight_OIK.shape[2]) // stride + 1
        y_BTO = x_BTI.new_empty(())
        for offset, taps in _parts(weight_OIK, stride):
            windows_BTJ = _windows(x_BTI, offset, taps, stride, steps)
            weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
            y_BTO = y_BTO.baddbmm_(windows_BTJ, weight_BJO) if offset else torch.bmm(windows_BTJ, weight_BJO)
        return y_BTO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BTI, weight_OIK = ctx.saved_tensors
        # Gradients may be computed where autocast is on, too.
        with without_autocast(x_BTI):
            of_x_BTI, of_weight_OIK = _gradients(
                x_BTI, weight_OIK, gradients[0].contiguous(), ctx.stride, wanted=ctx.needs_input_grad[:2]
            )
        return of_x_BTI, of_weight_OIK, None


def _gradients(
    x_BTI: Tensor, weight_OIK: Tensor, gradient_BTO: Tensor, stride: int, *, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the weights, from the output's."""
    steps = gradient_BTO.shape[1]
    of_x_BTI = torch.empty_like(x_BTI) if wanted[0] else None
    if of_x_BTI is not None:
        # If the first taps are as many as the stride, their windows lie side by side: written, not added to.
        side_by_side = weight_OIK.shape[2] >= stride
        of_x_BTI[:, steps * stride if side_by_side else 0 :].zero_()
    of_weight: list[Tensor] = []
    for offset, taps in _parts(weight_OIK, stride):
        windows_BTJ = _windows(x_BTI, offset, taps, stride, steps)
        if wanted[1]:
            of_matrix_JO = torch.bmm(windows_BTJ.transpose(1, 2), gradient_BTO).sum(dim=0)
            of_weight.append(of_matrix_JO.view(taps, -1, of_matrix_JO.shape[1]))
        if of_x_BTI is not None:
            weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
            of_windows_BTJ = _windows(of_x_BTI, offset, taps, stride, steps)
            written = side_by_side and offset == 0
            of_windows_BTJ.baddbmm_(gradient_BTO, weight_BJO.transpose(1, 2), beta=0.0 if written else 1.0)
    return of_x_BTI, torch.cat(of_weight).permute(2, 1, 0) if of_weight else None


def _parts(weight_OIK: Tensor, stride: int) -> Iterator[tuple[int, int]]:
    """Offset and number of the taps that are computed together: at most `stride`, so that windows do not overlap."""
    kernel = weight_OIK.shape[2]
    for offset in range(0, kernel, stride):
        yield offset, min(stride, kernel - offset)


def _windows(x_BTI: Tensor, offset: int, taps: int, stride: int, steps: int) -> Tensor:
    """A view [B, steps, taps x I]."""
    batch, length, inputs = x_BTI.shape
    return x_BTI.as_strided(
        (batch, steps, taps * inputs),
        (length * inputs, stride * inputs, 1),
        x_BTI.storage_offset() + offset * inputs,
    )


def _matrix(weight_OIK: Tensor, offset: int, taps: int) -> Tensor:
    """Some taps' weights as [taps x I, O]."""
    return weight_OIK[:, :, offset : offset + taps].permute(2, 1, 0).flatten(0, 1)
