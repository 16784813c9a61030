"""Convolutions over time with the channels last, as matrix products.

A strided one is products on views of its input: a window of `stride` frames begins at every stride-th frame, so that
windows lie behind each other in memory. Of kernel 3 and stride 2 the first two taps are one product on [T / 2, 2 I],
the third is another on every second frame. No window is copied, and all arithmetic runs at the rate of matrix products.

On CPUs a convolution with a long kernel is computed in the frequency domain, which needs far fewer operations. On GPUs
it is one product of overlapping windows with a banded matrix: for groups of 48 channels five times as fast on an H100
as cuDNN's convolution (docs/performance.md).
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
    if x_BTD.device.type == "cuda":
        return convolution_in_blocks(x_BTD, weight_DIK.to(x_BTD.dtype), groups) + bias_D.to(x_BTD.dtype)
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


class _BlockedConvolution(torch.autograd.Function):
    """`BLOCK` output frames at a time, from `BLOCK` + K - 1 input frames. No frame is added up in bf16."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DIK)
        ctx.groups = groups
        return _in_blocks(x_BTD, _grouped(weight_DIK, groups), before=weight_DIK.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BTD, weight_DIK = ctx.saved_tensors
        kernel = weight_DIK.shape[2]
        of_x_BTD = of_weight_DIK = None
        with _without_autocast(x_BTD):
            if ctx.needs_input_grad[0]:
                # A convolution with the flipped kernel: left and right padding swap.
                flipped_GIOK = _grouped(weight_DIK, ctx.groups).transpose(1, 2).flip(3)
                of_x_BTD = _in_blocks(gradients[0], flipped_GIOK, before=kernel - 1 - kernel // 2)
            if ctx.needs_input_grad[1]:
                of_weight_DIK = _weight_gradient(x_BTD, gradients[0], ctx.groups, kernel).to(weight_DIK.dtype)
        return of_x_BTD, of_weight_DIK, None


def _weight_gradient(x_BTD: Tensor, gradient_BTD: Tensor, groups: int, kernel: int) -> Tensor:
    """[D, D / groups, K]: the banded matrix's gradient, added up along its diagonals in fp32."""
    windows_GNJ = _overlapping_windows(x_BTD, groups, kernel, before=kernel // 2)
    blocks_GNP = _overlapping_windows(gradient_BTD, groups, kernel=1, before=0)
    of_band_GJP = windows_GNJ.transpose(1, 2) @ blocks_GNP
    of_band_GJILO = of_band_GJP.unflatten(2, (BLOCK, -1)).unflatten(1, (BLOCK + kernel - 1, -1))
    wide = torch.promote_types(of_band_GJP.dtype, torch.float32)
    of_weight_GKIO = torch.zeros_like(of_band_GJILO[:, :kernel, :, 0], dtype=wide)
    for shift in range(BLOCK):
        of_weight_GKIO += of_band_GJILO[:, shift : shift + kernel, :, shift]
    return of_weight_GKIO.permute(0, 3, 2, 1).flatten(0, 1)


def convolution_in_blocks(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """See `long_convolution`; without a bias, by products of overlapping windows with a banded matrix."""
    with _without_autocast(x_BTD):
        y_BTD: Tensor = _BlockedConvolution.apply(x_BTD, weight_DIK, groups)
    return y_BTD


BLOCK = 8
"""Output frames of one window. More add arithmetic, fewer copy more: on an H100 16 and 32 were slower (docs/lab)."""


def _grouped(weight_DIK: Tensor, groups: int) -> Tensor:
    return weight_DIK.unflatten(0, (groups, -1))


def _in_blocks(x_BTD: Tensor, weight_GOIK: Tensor, *, before: int) -> Tensor:
    """A convolution with `before` frames of padding before the first frame; as many frames out as in."""
    groups, outputs, inputs, kernel = weight_GOIK.shape
    weight_GOKI = weight_GOIK.transpose(2, 3)
    shifted = [F.pad(weight_GOKI, (0, 0, shift, BLOCK - 1 - shift)) for shift in range(BLOCK)]
    band_GPJ = torch.stack(shifted, dim=1).view(groups, BLOCK * outputs, (BLOCK + kernel - 1) * inputs)
    windows_GNJ = _overlapping_windows(x_BTD, groups, kernel, before=before)
    y_GNP = windows_GNJ @ band_GPJ.transpose(1, 2)
    y_GBTO = y_GNP.view(groups, x_BTD.shape[0], -1, outputs)
    return y_GBTO.permute(1, 2, 0, 3).flatten(2)[:, : x_BTD.shape[1]]


def _overlapping_windows(x_BTD: Tensor, groups: int, kernel: int, *, before: int) -> Tensor:
    """What each block of output frames sees, by group: a copy [G, N, (BLOCK + K - 1) x I] of N blocks."""
    batch, steps, _ = x_BTD.shape
    blocks = -(-steps // BLOCK)
    padded_BTD = F.pad(x_BTD, (0, 0, before, blocks * BLOCK + kernel - 1 - before - steps))
    x_GBTI = padded_BTD.unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
    return x_GBTI.unfold(2, BLOCK + kernel - 1, BLOCK).transpose(3, 4).reshape(groups, batch * blocks, -1)
