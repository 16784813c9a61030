"""The contrastive loss: tell the quantized vector of a masked frame from those of other masked frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """Cosine similarities / temperature, fp32 [M, 1 + K]: the positive first, then the negatives.

    Within an utterance every similarity is an entry of one matrix product, so vectors of negatives are never
    materialised. A negative with the same codes as the positive is no negative: it is -inf.
    """
    context_BND = _by_utterance(
        F.normalize(context_MD.float(), dim=1, eps=1e-8), utterance_M, slot_M, utterances, slots
    )
    targets_BND = _by_utterance(
        F.normalize(targets_MD.float(), dim=1, eps=1e-8), utterance_M, slot_M, utterances, slots
    )
    similarities_MN = torch.bmm(context_BND, targets_BND.transpose(1, 2))[utterance_M, slot_M]
    ids_BN = ids_M.new_zeros(utterances, slots).index_put((utterance_M, slot_M), ids_M)
    same_MN = ids_BN[utterance_M] == ids_M.unsqueeze(1)
    logits_MN = similarities_MN / temperature
    negatives_MK = negatives_MK.long()
    positive_M1 = logits_MN.gather(1, slot_M.unsqueeze(1))
    negative_MK = logits_MN.masked_fill(same_MN, -torch.inf).gather(1, negatives_MK)
    return torch.cat([positive_M1, negative_MK], dim=1)


def contrastive_loss(logits_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(summed cross entropy in nats, number of frames whose positive has the highest similarity)."""
    wanted_M = torch.zeros(logits_MK.shape[0], dtype=torch.long, device=logits_MK.device)
    loss = F.cross_entropy(logits_MK, wanted_M, reduction="sum")
    return loss, (logits_MK.detach().argmax(dim=1) == 0).sum()


def _by_utterance(x_MD: Tensor, utterance_M: Tensor, slot_M: Tensor, utterances: int, slots: int) -> Tensor:
    return x_MD.new_zeros(utterances, slots, x_MD.shape[1]).index_put((utterance_M, slot_M), x_MD)
