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
        y_BTO: Tensor = _convolve(x_BTI.contiguous(), weight_OIK.to(x_BTI.dtype), stride)
        return y_BTO if bias_O is None else y_BTO + bias_O.to(x_BTI.dtype)


# Custom operators, because torch.compile would replace the products in place by copies.


@torch.library.custom_op("w2vscale::strided_products", mutates_args=())
def _convolve(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    steps = (x_BTI.shape[1] - weight_OIK.shape[2]) // stride + 1
    y_BTO = x_BTI.new_empty(())
    for offset, taps in _parts(weight_OIK, stride):
        windows_BTJ = _windows(x_BTI, offset, taps, stride, steps)
        weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
        y_BTO = y_BTO.baddbmm_(windows_BTJ, weight_BJO) if offset else torch.bmm(windows_BTJ, weight_BJO)
    return y_BTO


@torch.library.custom_op("w2vscale::strided_products_of_input", mutates_args=())
def _gradient_of_input(gradient_BTO: Tensor, weight_OIK: Tensor, length: int, stride: int) -> Tensor:
    """Gradient [B, length, I] of the input, from the output's."""
    batch, steps = gradient_BTO.shape[:2]
    of_x_BTI = gradient_BTO.new_empty(batch, length, weight_OIK.shape[1])
    # If the first taps are as many as the stride, their windows lie side by side: written, not added to.
    side_by_side = weight_OIK.shape[2] >= stride
    of_x_BTI[:, steps * stride if side_by_side else 0 :].zero_()
    for offset, taps in _parts(weight_OIK, stride):
        weight_BOJ = _matrix(weight_OIK, offset, taps).T.expand(batch, -1, -1)
        of_windows_BTJ = _windows(of_x_BTI, offset, taps, stride, steps)
        written = side_by_side and offset == 0
        of_windows_BTJ.baddbmm_(gradient_BTO, weight_BOJ, beta=0.0 if written else 1.0)
    return of_x_BTI


@torch.library.custom_op("w2vscale::strided_products_of_weight", mutates_args=())
def _gradient_of_weight(x_BTI: Tensor, gradient_BTO: Tensor, kernel: int, stride: int) -> Tensor:
    """Gradient [O, I, kernel] of the weights, from the output's."""
    steps = gradient_BTO.shape[1]
    of_weight_KIO = x_BTI.new_empty(kernel, x_BTI.shape[2], gradient_BTO.shape[2])
    for offset in range(0, kernel, stride):
        taps = min(stride, kernel - offset)
        windows_BTJ = _windows(x_BTI, offset, taps, stride, steps)
        of_matrix_JO = torch.bmm(windows_BTJ.transpose(1, 2), gradient_BTO).sum(dim=0)
        of_weight_KIO[offset : offset + taps] = of_matrix_JO.view(taps, -1, of_matrix_JO.shape[1])
    return of_weight_KIO.permute(2, 1, 0).contiguous()


@_convolve.register_fake
def _(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    steps = (x_BTI.shape[1] - weight_OIK.shape[2]) // stride + 1
    return x_BTI.new_empty(x_BTI.shape[0], steps, weight_OIK.shape[0])


@_gradient_of_input.register_fake
def _(gradient_BTO: Tensor, weight_OIK: Tensor, length: int, stride: int) -> Tensor:
    return gradient_BTO.new_empty(gradient_BTO.shape[0], length, weight_OIK.shape[1])


@_gradient_of_weight.register_fake
def _(x_BTI: Tensor, gradient_BTO: Tensor, kernel: int, stride: int) -> Tensor:
    return x_BTI.new_empty(gradient_BTO.shape[2], x_BTI.shape[2], kernel)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.stride = inputs[2]


def _gradients(ctx: Any, gradient_BTO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_BTI, weight_OIK = ctx.saved_tensors
    gradient_BTO = gradient_BTO.contiguous()
    of_x_BTI = of_weight_OIK = None
    with without_autocast(x_BTI):  # gradients may be computed where autocast is on
        if ctx.needs_input_grad[0]:
            of_x_BTI = _gradient_of_input(gradient_BTO, weight_OIK, x_BTI.shape[1], ctx.stride)
        if ctx.needs_input_grad[1]:
            of_weight_OIK = _gradient_of_weight(x_BTI, gradient_BTO, weight_OIK.shape[2], ctx.stride)
    return of_x_BTI, of_weight_OIK, None


_convolve.register_autograd(_gradients, setup_context=_save)


def _parts(weight_OIK: Tensor, stride: int) -> Iterator[tuple[int, int]]:
    """Offset and number of the taps that are computed together: at most `stride`, so that windows do not overlap."""
    kernel = weight_OIK.shape[2]
    for offset in range(0, kernel, stride):
        yield offset, min(stride, kernel - offset)


def _windows(x_BTI: Tensor, offset: int, taps: int, stride: int, steps: int) -> Tensor:
    """A view [B, steps, taps x I]: windows of `taps` steps, `stride` steps apart, from step `offset` on."""
    batch, _, inputs = x_BTI.shape
    return x_BTI[:, offset:].view(batch, -1).unfold(1, taps * inputs, stride * inputs)[:, :steps]


def _matrix(weight_OIK: Tensor, offset: int, taps: int) -> Tensor:
    """Some taps' weights as [taps x I, O]."""
    return weight_OIK[:, :, offset : offset + taps].permute(2, 1, 0).flatten(0, 1)
