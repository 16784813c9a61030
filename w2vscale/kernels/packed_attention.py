"""Attention within packed utterances by FlashAttention (Dao 2023, arXiv:2307.08691), on GPUs.

Replaces `attention` in bf16. With a mask, PyTorch chooses its memory-efficient kernel, which took three times as long
as FlashAttention on an H100 (docs/performance.md). Held to the plain version by tests/kernels/test_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2vscale.kernels.packing import Packing


def packed_attention(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float) -> Tensor:
    """See `w2vscale.models.wav2vec2.attention`."""
    return flash_attention(q_NHE, k_NHE, v_NHE, packing, probability) if takes_packed(q_NHE) else NotImplemented


def flash_attention(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float) -> Tensor:
    """Compute attention by FlashAttention, whatever the device."""
    bounds, steps = packing.bounds, packing.steps
    # The operation that nested tensors call: the public functions for packed sequences have no dropout.
    y_NHE: Tensor = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NHE, v_NHE, bounds, bounds, steps, steps, probability, False, False
    )[0]
    return y_NHE


def takes_packed(q_NHE: Tensor) -> bool:
    """Whether FlashAttention can compute these inputs: bf16 on a GPU of compute capability 8 or higher."""
    return q_NHE.device.type == "cuda" and suits_flash_attention(q_NHE) and has_flash_attention(q_NHE.device.index)


def suits_flash_attention(q_NHE: Tensor) -> bool:
    """Whether FlashAttention takes such a tensor, on a GPU that has it."""
    size = q_NHE.shape[2]
    return q_NHE.dtype == torch.bfloat16 and size % 8 == 0 and size <= 256


def has_flash_attention(device: int | None) -> bool:
    """Whether a GPU has FlashAttention. torch.compile cannot trace this: see `engine.transforms`."""
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)
