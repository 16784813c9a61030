"""Product quantization with Gumbel softmax (Jang et al. 2017; Baevski et al. 2020, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.models.layers import Linear
from w2vscale.objectives.base import Finding


class Quantized(NamedTuple):
    """M frames, quantized with G codebooks of V entries each."""

    vectors_MD: Tensor
    codes_MG: Tensor
    logits_MGV: Tensor  # fp32, without noise or temperature


class Quantizer(nn.Module):
    """Selects one of V `entries` of each of G `codebooks` per frame, and concatenates their vectors to width `dim`."""

    def __init__(self, inputs: int, *, codebooks: int, entries: int, dim: int) -> None:
        super().__init__()
        self.codebooks, self.entries = codebooks, entries
        self.projection = Linear(inputs, codebooks * entries, init=nn.init.normal_)
        self.codevectors = nn.Parameter(torch.empty(codebooks, entries, dim // codebooks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codevectors)

    def forward(self, x_MC: Tensor, noise_MGV: Tensor | None, temperature: float) -> Quantized:
        """Quantize frames [M, C] by a hard selection with straight-through gradients; without noise by the argmax."""
        frames = x_MC.shape[0]
        logits_MGV = self.projection(x_MC).float().view(frames, self.codebooks, self.entries)
        if noise_MGV is None:
            codes_MG = logits_MGV.argmax(dim=2)
            choice_MGV = F.one_hot(codes_MG, self.entries).float()
        else:
            soft_MGV = ((logits_MGV + noise_MGV) / temperature).softmax(dim=2)
            codes_MG = soft_MGV.argmax(dim=2)
            choice_MGV = F.one_hot(codes_MG, self.entries) - soft_MGV.detach() + soft_MGV
        vectors_GME = choice_MGV.transpose(0, 1).to(x_MC.dtype) @ self.codevectors.to(x_MC.dtype)
        return Quantized(vectors_GME.transpose(0, 1).flatten(1), codes_MG, logits_MGV)


def code_ids(codes_MG: Tensor, entries: int) -> Tensor:
    """Encode the codes of each frame in all codebooks as a single integer, [M]."""
    ids_M = codes_MG[:, 0]
    for group in range(1, codes_MG.shape[1]):
        ids_M = ids_M * entries + codes_MG[:, group]
    return ids_M


def diversity_loss(mean_probabilities_KGV: Tensor) -> Tensor:
    """Compute the diversity loss of each micro-batch, [K]: (G V - sum over g of exp H(p_g)) / (G V).

    It is 0 if all entries are used equally and near 1 if only one is used. p_g is the softmax of the logits of codebook
    g, averaged over the masked frames of a micro-batch (equation 4 of the paper, in the form that fairseq uses).
    """
    size = mean_probabilities_KGV.shape[1] * mean_probabilities_KGV.shape[2]
    return (size - perplexity(mean_probabilities_KGV).sum(dim=1)) / size


def perplexity(probabilities: Tensor) -> Tensor:
    """Return exp of the entropy of each distribution [..., V]: the effective number of entries in use."""
    return torch.exp(-(probabilities * torch.log(probabilities + 1e-7)).sum(dim=-1))


def fewest_codes(entries: int, share: float) -> float:
    """Return the code perplexity below which a codebook has collapsed: entries^share.

    With it, a code carries `share` of the log2(entries) bits that it carries if all entries are used equally.
    """
    return float(entries**share)


def collapse(metrics: Mapping[str, float], *, codebooks: int, entries: int, share: float, advice: str) -> list[Finding]:
    """Find collapse in the metrics `code_perplexity_g`. `share` is the setting `health.min_codes`; 0: do not look."""
    fewest = fewest_codes(entries, share) if share else 0.0
    in_use = {book: metrics[f"code_perplexity_{book}"] for book in range(codebooks)}
    collapsed = {str(book): f"{codes:.2f}" for book, codes in in_use.items() if codes < fewest}
    if not collapsed:
        return []
    books = f"codebook {', '.join(collapsed)} has" if len(collapsed) == 1 else f"codebooks {', '.join(collapsed)} have"
    return [
        Finding(
            "collapse",
            f"{books} collapsed: {', '.join(collapsed.values())} of {entries} entries in use, fewer than {fewest:.2f} "
            f"(health.min_codes={share:g}); {advice}",
        )
    ]
