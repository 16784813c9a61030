"""Product quantization with Gumbel softmax (Jang et al. 2017; Baevski et al. 2020, section 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import ModelConfig
from w2vscale.models.layers import Linear


class Quantized(NamedTuple):
    """M frames quantized with G codebooks of V entries."""

    vectors_MD: Tensor
    codes_MG: Tensor
    logits_MGV: Tensor  # raw, fp32


class Quantizer(nn.Module):
    """Chooses one entry of each codebook per frame."""

    def __init__(self, config: ModelConfig, inputs: int) -> None:
        super().__init__()
        self.codebooks, self.entries = config.codebooks, config.codebook_entries
        self.projection = Linear(inputs, self.codebooks * self.entries, std=1.0)
        self.codevectors = nn.Parameter(
            torch.empty(self.codebooks, self.entries, config.codevector_dim // self.codebooks)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codevectors)

    def forward(self, x_MC: Tensor, noise_MGV: Tensor | None, temperature: float) -> Quantized:
        """Hard choice with straight-through gradients where there is Gumbel noise, the plain argmax without."""
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
    """One integer per combination of codes, [M]."""
    ids_M = codes_MG[:, 0]
    for group in range(1, codes_MG.shape[1]):
        ids_M = ids_M * entries + codes_MG[:, group]
    return ids_M


def diversity_loss(mean_probabilities_GV: Tensor) -> Tensor:
    """(G V - sum over g of exp H(p_g)) / (G V): 0 where all entries are used alike, near 1 where one is.

    p_g is the softmax of the raw logits averaged over a micro-batch's masked frames (equation 4 of the paper, in
    the form of fairseq, which trains on it).
    """
    p_GV = mean_probabilities_GV
    return (p_GV.numel() - perplexity(p_GV).sum()) / p_GV.numel()


def perplexity(probabilities_GV: Tensor) -> Tensor:
    """exp of the entropy of each distribution, [G]: how many entries are in use."""
    return torch.exp(-(probabilities_GV * torch.log(probabilities_GV + 1e-7)).sum(dim=-1))
