"""The contrastive loss: sampling of negatives, cosine similarities with quantized targets, and cross entropy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def negative_indices(masked: int, negatives: int, generator: np.random.Generator) -> NDArray[np.integer]:
    """Draw the negatives of each masked frame of one utterance. Returns indices of masked frames, [masked, negatives].

    They are uniform, with replacement, over the other masked frames: drawn from [0, masked - 1), then increased by 1 if
    not below the index of the frame itself (fairseq `sample_negatives`).
    """
    if masked < 2:
        return np.zeros((masked, negatives), dtype=np.int16)
    # Small integer types, because loader processes send these arrays to the main process.
    dtype = np.int16 if masked <= np.iinfo(np.int16).max else np.int32
    drawn = generator.integers(0, masked - 1, size=(masked, negatives), dtype=dtype)
    own: NDArray[np.int32] = np.arange(masked, dtype=np.int32)[:, None]
    return drawn + (drawn >= own)


def contrastive_logits(
    context_MD: Tensor,
    targets_MD: Tensor,
    ids_M: Tensor,
    *,
    utterance_M: Tensor,
    slot_M: Tensor,
    negatives_MK: Tensor,
    utterances: int,
    slots: int,
    temperature: float,
) -> Tensor:
    """Compute cosine similarities / temperature, fp32 [M, 1 + K]: the positive first, then the negatives.

    One matrix product per utterance gives all similarities, so the vectors of negatives are never copied. A negative
    with the same codes as the positive is excluded: its logit is -inf.
    """

    def unit_vectors(x_MD: Tensor) -> Tensor:
        """Return the vectors scaled to length 1, by utterance: [B, N, D]."""
        unit_MD = F.normalize(x_MD.float(), dim=1, eps=1e-8)
        return unit_MD.new_zeros(utterances, slots, x_MD.shape[1]).index_put((utterance_M, slot_M), unit_MD)

    context_BND, targets_BND = unit_vectors(context_MD), unit_vectors(targets_MD)
    similarities_MN = torch.bmm(context_BND, targets_BND.transpose(1, 2))[utterance_M, slot_M]
    ids_BN = ids_M.new_zeros(utterances, slots).index_put((utterance_M, slot_M), ids_M)
    same_MN = ids_BN[utterance_M] == ids_M.unsqueeze(1)
    logits_MN = similarities_MN / temperature
    positive_M1 = logits_MN.gather(1, slot_M.unsqueeze(1))
    negative_MK = logits_MN.masked_fill(same_MN, -torch.inf).gather(1, negatives_MK.long())
    return torch.cat([positive_M1, negative_MK], dim=1)


def contrastive_loss(logits_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (summed cross entropy in nats, number of frames whose positive has the highest similarity)."""
    wanted_M = torch.zeros(logits_MK.shape[0], dtype=torch.long, device=logits_MK.device)
    loss = F.cross_entropy(logits_MK, wanted_M, reduction="sum")
    return loss, correct_predictions(logits_MK).sum()


def correct_predictions(logits_MK: Tensor) -> Tensor:
    """Return the frames whose positive has the highest similarity, [M] bool."""
    return logits_MK.detach().argmax(dim=1) == 0
