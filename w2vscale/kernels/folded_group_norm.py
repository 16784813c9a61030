"""GroupNorm (Wu & He 2018) folded into the weights of the first convolution.

Replaces `normalized_convolution` and `convolution_statistics` for one input channel. Mean and variance of w·x over all
steps follow from the mean products of the few taps x: wᵀE[x] and wᵀE[xxᵀ]w. So the norm becomes part of the weights,
and nothing as long as the audio is normalised or kept for the backward: on a CPU GroupNorm's time vanishes (docs/lab).
Held to the plain version by tests/kernels/test_normalized_convolution.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.kernels.precision import without_autocast
from w2vscale.kernels.taps import matrix_of, taps_of

STEPS = 8192
"""Steps whose taps are copied as fp64 at a time: for 78 s of audio in five utterances, 5 MB in place of 32."""


def folded_group_norm(
    x_BTI: Tensor,
    valid_BT: Tensor | None,
    weight_OIK: Tensor,
    bias_O: Tensor | None,
    scale_O: Tensor,
    shift_O: Tensor,
    *,
    stride: int,
    groups: int,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `w2vscale.models.wav2vec2.normalized_convolution`."""
    kernel = weight_OIK.shape[2]
    if x_BTI.shape[2] != 1:
        return NotImplemented
    taps_BTJ = taps_of(x_BTI.squeeze(2), kernel, stride)
    if valid_BT is not None:
        taps_BTJ = taps_BTJ * valid_BT.unsqueeze(2)
    weight_OJ = matrix_of(weight_OIK, bias_O, taps_BTJ.shape[2]).double()
    moments_BJJ = _moments(taps_BTJ, valid_BT)
    mean_BG, variance_BG = statistics or _statistics(weight_OJ, moments_BJJ, one=kernel, groups=groups)
    repeats = weight_OJ.shape[0] // groups
    mean_BO, deviation_BO = (
        x_BG.double().repeat_interleave(repeats, dim=1) for x_BG in (mean_BG, (variance_BG + eps).sqrt())
    )
    scale_BO = scale_O.double() / deviation_BO
    shift_BO1 = (shift_O.double() - mean_BO * scale_BO).unsqueeze(2)
    weight_BOJ = weight_OJ * scale_BO.unsqueeze(2) + F.pad(shift_BO1, (kernel, weight_OJ.shape[1] - kernel - 1))
    weight_BOJ = _rounded(weight_BOJ, taps_BTJ.dtype, moments_BJJ[:, kernel], spare=kernel + 1)
    with without_autocast(x_BTI):
        return taps_BTJ @ weight_BOJ.transpose(1, 2)


def folded_statistics(
    x_BTI: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, *, stride: int, groups: int
) -> tuple[Tensor, Tensor]:
    """See `w2vscale.models.wav2vec2.convolution_statistics`."""
    kernel = weight_OIK.shape[2]
    if x_BTI.shape[2] != 1:
        return NotImplemented
    taps_BTJ = taps_of(x_BTI.squeeze(2), kernel, stride)
    weight_OJ = matrix_of(weight_OIK, bias_O, taps_BTJ.shape[2]).double()
    return _statistics(weight_OJ, _moments(taps_BTJ, None), one=kernel, groups=groups)


def _moments(taps_BTJ: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Mean products [B, J, J] of the taps over an utterance's steps, in fp64; those behind its end are zeros."""
    sums_BJJ: Tensor = _products(taps_BTJ)
    return sums_BJJ / (taps_BTJ.shape[1] if valid_BT is None else valid_BT.sum(dim=1).view(-1, 1, 1))


@torch.library.custom_op("w2vscale::products_of_taps", mutates_args=())
def _products(taps_BTJ: Tensor) -> Tensor:
    """Sum the products [B, J, J] of the taps over all steps, in fp64. `STEPS` steps at a time are copied as fp64."""
    batch, _, columns = taps_BTJ.shape
    sums_BJJ = taps_BTJ.new_zeros(batch, columns, columns, dtype=torch.float64)
    for part_BTJ in taps_BTJ.split(STEPS, dim=1):
        exact_BTJ = part_BTJ.double()
        sums_BJJ.baddbmm_(exact_BTJ.transpose(1, 2), exact_BTJ)
    return sums_BJJ


@_products.register_fake
def _(taps_BTJ: Tensor) -> Tensor:
    return taps_BTJ.new_empty(taps_BTJ.shape[0], *[taps_BTJ.shape[2]] * 2, dtype=torch.float64)


def _gradient_of_taps(ctx: Any, gradient_BJJ: Tensor) -> Tensor:
    (taps_BTJ,) = ctx.saved_tensors
    return (taps_BTJ.double() @ (gradient_BJJ + gradient_BJJ.transpose(1, 2))).to(taps_BTJ.dtype)


_products.register_autograd(_gradient_of_taps, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _statistics(weight_OJ: Tensor, moments_BJJ: Tensor, *, one: int, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, G] of the convolution's outputs. Tap number `one` is 1 in all steps."""
    products_BOJ = weight_OJ @ moments_BJJ
    mean_BG = products_BOJ[:, :, one].unflatten(1, (groups, -1)).mean(dim=2)
    square_BG = (products_BOJ * weight_OJ).sum(dim=2).unflatten(1, (groups, -1)).mean(dim=2)
    return mean_BG, (square_BG - mean_BG.square()).clamp(min=0.0)


def _rounded(weight_BOJ: Tensor, dtype: torch.dtype, means_BJ: Tensor, *, spare: int) -> Tensor:
    """Weights in `dtype`; that of tap `spare` restores what rounding the others took from the mean over all steps."""
    rounded_BOJ = weight_BOJ.to(dtype)
    missing_BO1 = ((weight_BOJ - rounded_BOJ).detach() @ means_BJ.unsqueeze(2)).to(dtype)
    return rounded_BOJ + F.pad(missing_BO1, (spare, weight_BOJ.shape[2] - spare - 1))
