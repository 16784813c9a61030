"""The positional convolution as one product of overlapping windows with a banded matrix.

Replaces `positional_convolution` on GPUs: for groups of 48 channels five times as fast on an H100 as cuDNN's
convolution (docs/performance.md). A window of `BLOCK` + K - 1 frames gives `BLOCK` output frames. Gradients of weights
are summed over frames in fp32. Held to the plain version by tests/kernels/test_positional_convolution.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.kernels.precision import without_autocast

# Output frames of one window. More add arithmetic, fewer copy more: on an H100 16 and 32 were slower (docs/lab).
BLOCK = 8


def blocked_convolution(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """See `w2vscale.models.wav2vec2.positional_convolution`; products are in the type of `x_BTD`."""
    with without_autocast(x_BTD):
        y_BTD: Tensor = _BlockedConvolution.apply(x_BTD, weight_DIK.to(x_BTD.dtype), groups)
        return y_BTD + bias_D.to(x_BTD.dtype)


class _BlockedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DIK)
        ctx.groups = groups
        return _in_blocks(x_BTD, weight_DIK.unflatten(0, (groups, -1)), before=weight_DIK.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BTD, weight_DIK = ctx.saved_tensors
        kernel = weight_DIK.shape[2]
        of_x_BTD = of_weight_DIK = None
        with without_autocast(x_BTD):
            if ctx.needs_input_grad[0]:
                # A convolution with the flipped kernel: left and right padding swap.
                flipped_GIOK = weight_DIK.unflatten(0, (ctx.groups, -1)).transpose(1, 2).flip(3)
                of_x_BTD = _in_blocks(gradients[0], flipped_GIOK, before=kernel - 1 - kernel // 2)
            if ctx.needs_input_grad[1]:
                of_weight_DIK = _weight_gradient(x_BTD, gradients[0], ctx.groups, kernel).to(weight_DIK.dtype)
        return of_x_BTD, of_weight_DIK, None


def _weight_gradient(x_BTD: Tensor, gradient_BTD: Tensor, groups: int, kernel: int) -> Tensor:
    """Sum the gradient of the banded matrix along its diagonals, in fp32: [D, D / groups, K]."""
    windows_GNJ = _overlapping_windows(x_BTD, groups, kernel, before=kernel // 2)
    blocks_GNP = _overlapping_windows(gradient_BTD, groups, kernel=1, before=0)
    of_band_GJP = windows_GNJ.transpose(1, 2) @ blocks_GNP
    of_band_GJILO = of_band_GJP.unflatten(2, (BLOCK, -1)).unflatten(1, (BLOCK + kernel - 1, -1))
    wide = torch.promote_types(of_band_GJP.dtype, torch.float32)
    of_weight_GKIO = torch.zeros_like(of_band_GJILO[:, :kernel, :, 0], dtype=wide)
    for shift in range(BLOCK):
        of_weight_GKIO += of_band_GJILO[:, shift : shift + kernel, :, shift]
    return of_weight_GKIO.permute(0, 3, 2, 1).flatten(0, 1)


def _in_blocks(x_BTD: Tensor, weight_GOIK: Tensor, *, before: int) -> Tensor:
    """Convolve with `before` frames of padding before the first frame; the number of frames stays the same."""
    groups, outputs, inputs, kernel = weight_GOIK.shape
    weight_GOKI = weight_GOIK.transpose(2, 3)
    shifted = [F.pad(weight_GOKI, (0, 0, shift, BLOCK - 1 - shift)) for shift in range(BLOCK)]
    band_GPJ = torch.stack(shifted, dim=1).view(groups, BLOCK * outputs, (BLOCK + kernel - 1) * inputs)
    windows_GNJ = _overlapping_windows(x_BTD, groups, kernel, before=before)
    y_GNP = windows_GNJ @ band_GPJ.transpose(1, 2)
    y_GBTO = y_GNP.view(groups, x_BTD.shape[0], -1, outputs)
    return y_GBTO.permute(1, 2, 0, 3).flatten(2)[:, : x_BTD.shape[1]]


def _overlapping_windows(x_BTD: Tensor, groups: int, kernel: int, *, before: int) -> Tensor:
    """Copy the input of each of N blocks of output frames, by group: [G, N, (BLOCK + K - 1) x I]."""
    batch, steps, _ = x_BTD.shape
    blocks = -(-steps // BLOCK)
    padded_BTD = F.pad(x_BTD, (0, 0, before, blocks * BLOCK + kernel - 1 - before - steps))
    x_GBTI = padded_BTD.unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
    return x_GBTI.unfold(2, BLOCK + kernel - 1, BLOCK).transpose(3, 4).reshape(groups, batch * blocks, -1)
