"""Metrics of the pretraining objective from its sums."""

from __future__ import annotations

import math

from w2vscale.objectives.contrastive_model import LossSums
from w2vscale.objectives.quantizer import perplexity


def pretraining_metrics(sums: LossSums) -> dict[str, float]:
    """Figures per masked frame from sums over any number of micro-batches (and ranks).

    Losses in nats, `*_bits` in bits; `code_perplexity_g` counts the entries of codebook g in use by the chosen
    codes, `probability_perplexity_g` by the mean of the softmax. All are NaN where there is no masked frame.
    """
    frames = float(sums.masked) or math.nan
    values = {
        "loss": float(sums.total) / frames,
        "contrastive": float(sums.contrastive) / frames,
        "diversity": float(sums.diversity) / frames,
        "feature_penalty": float(sums.feature_penalty) / frames,
        "accuracy": float(sums.correct) / frames,
    }
    values["masked_frames"] = float(sums.masked)
    values["loss_bits"] = values["loss"] / math.log(2)
    values["contrastive_bits"] = values["contrastive"] / math.log(2)
    code_perplexity_G = perplexity(sums.code_counts_GV.double() / frames)
    probability_perplexity_G = perplexity(sums.probability_sums_GV.double() / frames)
    for codebook in range(code_perplexity_G.numel()):
        values[f"code_perplexity_{codebook}"] = float(code_perplexity_G[codebook])
        values[f"probability_perplexity_{codebook}"] = float(probability_perplexity_G[codebook])
    return values
