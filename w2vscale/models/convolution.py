"""Convolutions over time with the channels last, as matrix products.

A strided one is products on views of its input: a window of `stride` frames begins at every stride-th frame, so that
windows lie behind each other in memory. Of kernel 3 and stride 2 the first two taps are one product on [T / 2, 2 I],
the third is another on every second frame. No window is copied, and all arithmetic runs at the rate of matrix products.

One with a long kernel is, on CPUs, a product for each frequency: a fraction of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
        dtype = gradients[0].dtype
        x_BTI, weight_OIK, gradient_BTO = (widened(x) for x in (*ctx.saved_tensors, gradients[0].contiguous()))
        frames = gradient_BTO.shape[1]
        of_x_BTI = torch.empty_like(x_BTI) if ctx.needs_input_grad[0] else None
        if of_x_BTI is not None:
            # If the first taps are as many as the stride, their windows lie side by side: written, not added to.
            side_by_side = weight_OIK.shape[2] >= ctx.stride
            of_x_BTI[:, frames * ctx.stride if side_by_side else 0 :].zero_()
        of_weight: list[Tensor] = []
        for offset, taps in _parts(weight_OIK, ctx.stride):
            windows_BTJ = _windows(x_BTI, offset, taps, ctx.stride, frames)
            if ctx.needs_input_grad[1]:
                of_matrix_JO = torch.bmm(windows_BTJ.transpose(1, 2), gradient_BTO).sum(dim=0)
                of_weight.append(of_matrix_JO.view(taps, -1, of_matrix_JO.shape[1]))
            if of_x_BTI is not None:
                weight_BJO = _matrix(weight_OIK, offset, taps).expand(x_BTI.shape[0], -1, -1)
                of_windows_BTJ = _windows(of_x_BTI, offset, taps, ctx.stride, frames)
                written = side_by_side and offset == 0
                of_windows_BTJ.baddbmm_(gradient_BTO, weight_BJO.transpose(1, 2), beta=0.0 if written else 1.0)
        of_weight_OIK = torch.cat(of_weight).permute(2, 1, 0).to(dtype) if of_weight else None
        return None if of_x_BTI is None else of_x_BTI.to(dtype), of_weight_OIK, None


def strided_convolution(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    """`F.conv1d` of [B, T, I] with weights [O, I, K] and no padding: [B, (T - K) // stride + 1, O]."""
    device = x_BTI.device.type
    # What `baddbmm_` is given must be of one type; autocast would change that of some.
    autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with autocast:
        return _StridedConvolution.apply(x_BTI.contiguous(), weight_OIK, stride)


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
    """`F.conv1d` of [B, T, D] with `K // 2` frames of padding and weights [D, D / groups, K]: the first T frames."""
    steps, kernel = x_BTD.shape[1], weight_DIK.shape[2]
    # With fewer frames some taps see padding alone: their gradient is zero, of which a transform would make noise.
    if x_BTD.device.type == "cpu" and steps >= kernel:
        return _by_frequency(x_BTD, weight_DIK, groups) + bias_D
    y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight_DIK, bias_D, padding=kernel // 2, groups=groups)
    return y_BDT[:, :, :steps].transpose(1, 2)


def _by_frequency(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """In windows of twice the kernel, of whose outputs the first half is whole (overlap-save), in fp32."""
    dtype = x_BTD.dtype
    if dtype == torch.bfloat16:
        x_BTD, weight_DIK = x_BTD.float(), weight_DIK.float()
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
    return y_BTD[:, :steps].to(dtype)
