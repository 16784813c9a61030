"""Attention within utterances by FlashAttention (Dao 2023, arXiv:2307.08691), on GPUs.

Replaces `attention` for padded batches in bf16: a mask makes PyTorch choose its memory-efficient kernel, 2.8 times as
slow for `large` on an H100 (docs/performance.md). Held to the plain version by tests/kernels/test_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_attention(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, valid_BT: Tensor | None, probability: float
) -> Tensor:
    """See `w2vscale.models.wav2vec2.attention`. Padded frames attend to each other."""
    if valid_BT is None or not takes_segments(q_BHTE):
        return NotImplemented
    steps = q_BHTE.shape[2]
    q_NHE, k_NHE, v_NHE = (x_BHTE.transpose(1, 2).flatten(0, 1) for x_BHTE in (q_BHTE, k_BHTE, v_BHTE))
    bounds = segment_bounds(valid_BT)
    # The operation that nested tensors call: the public functions for packed sequences have no dropout.
    y_NHE = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NHE, v_NHE, bounds, bounds, steps, steps, probability, False, False
    )[0]
    return y_NHE.unflatten(0, valid_BT.shape).transpose(1, 2)


def segment_bounds(valid_BT: Tensor) -> Tensor:
    """Where segments of a flattened batch [B x T] begin and the last one ends, [2 B + 1] int32.

    Each utterance is a segment, and so is the padding behind it, which may be empty. Padded frames attend only to each
    other, so valid frames never see padding, and nothing needs to be packed.
    """
    batch, steps = valid_BT.shape
    starts = torch.arange(2 * batch + 1, dtype=torch.int32, device=valid_BT.device) // 2 * steps
    starts[1::2] += valid_BT.sum(dim=1, dtype=torch.int32)
    return starts


def takes_segments(q_BHTE: Tensor) -> bool:
    """Whether FlashAttention can compute these inputs: bf16 on a GPU of compute capability 8 or higher."""
    size = q_BHTE.shape[3]
    return (
        q_BHTE.device.type == "cuda"
        and q_BHTE.dtype == torch.bfloat16
        and size % 8 == 0
        and size <= 256
        and _has_flash_attention(q_BHTE.device.index)
    )


@torch.compiler.assume_constant_result
def _has_flash_attention(device: int | None) -> bool:
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)
