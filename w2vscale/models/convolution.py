"""Convolutions over time with the channels last, as matrix products.

A strided one is products on views of its input: a window of `stride` frames begins at every stride-th frame, so that
windows lie behind each other in memory. Of kernel 3 and stride 2 the first two taps are one product on [T / 2, 2 I],
the third is another on every second frame. No window is copied, and all arithmetic runs at the rate of matrix products.

One with a long kernel is, on CPUs, a product for each frequency: a fraction of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.models.products import widened


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x_BTI, weight_OIK)
        ctx.stride = stride
        dtype = x_BTI.dtype
        x_BTI, weight_OIK = widened(x_BTI), widened(weight_OIK)
        frames = (x_BTI.shape[1] - weight_OIK.shape[2]) // stride + 1
        y_BTO = x_BTI.new_empty(())
        for offset, taps in _parts(weight_OIK, stride):
            windows_BTJ = _windows(x_BTI, offset, taps, stride, frames)
            weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
            y_BTO = y_BTO.baddbmm_(windows_BTJ, weight_BJO) if offset else torch.bmm(windows_BTJ, weight_BJO)
        return y_BTO.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BTI, weight_OIK = ctx.saved_tensors
        # Gradients may be computed where autocast is on, too.
        with _without_autocast(x_BTI):
            of_x_BTI, of_weight_OIK = _strided_gradients(
                x_BTI, weight_OIK, gradients[0].contiguous(), ctx.stride, wanted=ctx.needs_input_grad[:2]
            )
        return of_x_BTI, of_weight_OIK, None


def _strided_gradients(
    x_BTI: Tensor, weight_OIK: Tensor, gradient_BTO: Tensor, stride: int, *, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and of the weights, from that of the output."""
    dtype, frames = gradient_BTO.dtype, gradient_BTO.shape[1]
    x_BTI, weight_OIK, gradient_BTO = widened(x_BTI), widened(weight_OIK), widened(gradient_BTO)
    of_x_BTI = torch.empty_like(x_BTI) if wanted[0] else None
    if of_x_BTI is not None:
        # If the first taps are as many as the stride, their windows lie side by side: written, not added to.
        side_by_side = weight_OIK.shape[2] >= stride
        of_x_BTI[:, frames * stride if side_by_side else 0 :].zero_()
    of_weight: list[Tensor] = []
    for offset, taps in _parts(weight_OIK, stride):
        windows_BTJ = _windows(x_BTI, offset, taps, stride, frames)
        if wanted[1]:
            of_matrix_JO = torch.bmm(windows_BTJ.transpose(1, 2), gradient_BTO).sum(dim=0)
            of_weight.append(of_matrix_JO.view(taps, -1, of_matrix_JO.shape[1]))
        if of_x_BTI is not None:
            weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
            of_windows_BTJ = _windows(of_x_BTI, offset, taps, stride, frames)
            written = side_by_side and offset == 0
            of_windows_BTJ.baddbmm_(gradient_BTO, weight_BJO.transpose(1, 2), beta=0.0 if written else 1.0)
    of_weight_OIK = torch.cat(of_weight).permute(2, 1, 0).to(dtype) if of_weight else None
    return None if of_x_BTI is None else of_x_BTI.to(dtype), of_weight_OIK


def strided_convolution(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    """`F.conv1d` of [B, T, I] with weights [O, I, K] and no padding: [B, (T - K) // stride + 1, O]."""
    with _without_autocast(x_BTI):
        return _StridedConvolution.apply(x_BTI.contiguous(), weight_OIK, stride)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from changing the type of some of the tensors that a function computes with."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _parts(weight_OIK: Tensor, stride: int) -> Iterator[tuple[int, int]]:
    """Offset and number of the taps that are computed together: at most `stride`, so that windows do not overlap."""
    kernel = weight_OIK.shape[2]
    for offset in range(0, kernel, stride):
        yield offset, min(stride, kernel - offset)


def _windows(x_BTI: Tensor, offset: int, taps: int, stride: int, frames: int) -> Tensor:
    """A view [B, frames, taps x I]."""
    batch, steps, inputs = x_BTI.shape
    return x_BTI.as_strided(
        (batch, frames, taps * inputs),
        (steps * inputs, stride * inputs, 1),
        x_BTI.storage_offset() + offset * inputs,
    )


def _matrix(weight_OIK: Tensor, offset: int, taps: int) -> Tensor:
    """Some taps' weights as [taps x I, O]."""
    return weight_OIK[:, :, offset : offset + taps].permute(2, 1, 0).flatten(0, 1)


def long_convolution(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """`F.conv1d` of [B, T, D] with `K // 2` frames of padding and weights [D, D / groups, K]: the first T frames.

    On CPUs bf16 inputs are computed in fp32, and the result is rounded once. There PyTorch's own bf16 convolutions
    with groups are wrong on processors with AMX (PyTorch 2.13: fewer than 16 channels per group, kernels of 16 or
    longer). Autocast does not change the type there.
    """
    if x_BTD.device.type != "cpu":
        return _direct(x_BTD, weight_DIK, bias_D, groups)
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    # With fewer frames some taps see padding alone: their gradient is zero, but a transform would leave noise there.
    convolve = _by_frequency if x_BTD.shape[1] >= weight_DIK.shape[2] else _direct
    with _without_autocast(x_BTD):
        return convolve(x_BTD.to(wide), weight_DIK.to(wide), bias_D.to(wide), groups).to(x_BTD.dtype)


def _direct(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    padding = weight_DIK.shape[2] // 2
    y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight_DIK, bias_D, padding=padding, groups=groups)
    return y_BDT[:, :, : x_BTD.shape[1]].transpose(1, 2)


def _by_frequency(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """In windows of twice the kernel, of whose outputs the first half is whole (overlap-save)."""
    batch, steps, channels = x_BTD.shape
    kernel, inputs = weight_DIK.shape[2], channels // groups
    windows = -(-steps // kernel)
    padded_BTD = F.pad(x_BTD, (0, 0, kernel // 2, (windows + 1) * kernel - kernel // 2 - steps))
    x_BWDF = torch.fft.rfft(padded_BTD.unfold(1, 2 * kernel, kernel))
    x_FGNI = x_BWDF.view(batch, windows, groups, inputs, -1).permute(4, 2, 0, 1, 3).flatten(2, 3)
    weight_DIF = torch.fft.rfft(weight_DIK, n=2 * kernel).conj()
    weight_FGIO = weight_DIF.view(groups, inputs, inputs, -1).permute(3, 0, 2, 1)
    y_FGNO = x_FGNI @ weight_FGIO
    y_BWGOF = y_FGNO.view(-1, groups, batch, windows, inputs).permute(2, 3, 1, 4, 0)
    y_BWGOK = torch.fft.irfft(y_BWGOF, n=2 * kernel)[..., :kernel]
    y_BTD = y_BWGOK.flatten(2, 3).transpose(2, 3).reshape(batch, windows * kernel, channels)
    return y_BTD[:, :steps] + bias_D
