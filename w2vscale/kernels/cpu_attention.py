"""Attention with dropout of its weights, on CPUs.

Replaces `attention` where there is dropout: PyTorch has no fused CPU kernel with dropout, and its fallback draws slowly
(sixteen_bit_dropout.py) and searches for rows that attend to nothing (docs/lab). Held to the plain version by
tests/kernels/test_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2vscale.kernels.packing import Packing
from w2vscale.kernels.sixteen_bit_dropout import unscaled_dropout


def attention_with_cpu_dropout(
    q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float
) -> Tensor:
    """See `w2vscale.models.wav2vec2.attention`."""
    if probability == 0.0:
        return NotImplemented
    q_BHTE, k_BHTE, v_BHTE = (packing.unpack(x_NHE).transpose(1, 2) for x_NHE in (q_NHE, k_NHE, v_NHE))
    valid_BT = packing.mask()
    scores_BHTT = (q_BHTE * q_BHTE.shape[-1] ** -0.5) @ k_BHTE.transpose(2, 3)
    if valid_BT is not None:
        never = torch.finfo(scores_BHTT.dtype).min
        bias_B11T = torch.zeros_like(valid_BT, dtype=scores_BHTT.dtype).masked_fill(~valid_BT, never)[:, None, None]
        scores_BHTT = scores_BHTT + bias_B11T
    weights_BHTT, factor = unscaled_dropout(scores_BHTT.softmax(dim=3), probability)
    return packing.pack((weights_BHTT @ (v_BHTE * factor)).transpose(1, 2))
