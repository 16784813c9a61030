"""The waveform's windows as rows of a matrix: a convolution with one input channel is one matrix product.

For the kernels of the first layer (folded_group_norm.py, strided_products.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def taps_of(waveforms_BS: Tensor, kernel: int, stride: int) -> Tensor:
    """Each output step's `kernel` samples, two ones, and zeros up to a multiple of eight: [B, T, J].

    The first of the ones is multiplied by the bias, the second by what rounding to bf16 took from it.
    """
    windows_BTK = waveforms_BS.unfold(1, kernel, stride)
    taps_BTJ = F.pad(windows_BTK, (0, 2 + -(kernel + 2) % 8))
    taps_BTJ[:, :, kernel : kernel + 2] = 1.0
    return taps_BTJ


def matrix_of(weight_O1K: Tensor, bias_O: Tensor | None, columns: int) -> Tensor:
    """What multiplies the taps: weights, bias and zeros, [O, J]."""
    weight_OJ = weight_O1K.squeeze(1)
    if bias_O is not None:
        weight_OJ = torch.cat([weight_OJ, bias_O.unsqueeze(1)], dim=1)
    return F.pad(weight_OJ, (0, columns - weight_OJ.shape[1]))
