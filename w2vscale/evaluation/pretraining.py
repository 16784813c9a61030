"""Metrics of the pretraining objective from its sums, and validation over a whole corpus."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import sum_over_ranks
from w2vscale.models.quantizer import perplexity
from w2vscale.models.wav2vec2 import LossSums


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
    values["loss_bits"] = values["loss"] / math.log(2)
    values["contrastive_bits"] = values["contrastive"] / math.log(2)
    code_perplexity_G = perplexity(sums.code_counts_GV.double() / frames)
    probability_perplexity_G = perplexity(sums.probability_sums_GV.double() / frames)
    for codebook in range(code_perplexity_G.numel()):
        values[f"code_perplexity_{codebook}"] = float(code_perplexity_G[codebook])
        values[f"probability_perplexity_{codebook}"] = float(probability_perplexity_G[codebook])
    return values


def reduce_sums(sums: LossSums) -> LossSums:
    """Sums over all ranks, in float64 on the CPU."""
    flat = torch.cat([field.detach().double().flatten().cpu() for field in sums])
    reduced = torch.tensor(sum_over_ranks(flat.tolist()), dtype=torch.float64)
    parts = reduced.split([field.numel() for field in sums])
    return LossSums(*(part.view(field.shape) for part, field in zip(parts, sums, strict=True)))


def validate(
    evaluate: Callable[[MicroBatch], LossSums], batches: Iterable[MicroBatch]
) -> tuple[dict[str, float], LossSums]:
    """Metrics, and the sums they are of, over all ranks' batches. Collective."""
    total: LossSums | None = None
    utterances = unusable = 0
    for batch in batches:
        sums = evaluate(batch)
        total = sums if total is None else total.plus(sums)
        utterances += batch.utterances
        unusable += len(batch.bad)
    assert total is not None
    reduced = reduce_sums(total)
    values = pretraining_metrics(reduced)
    values["masked_frames"] = float(reduced.masked)
    values["utterances"], values["unusable_utterances"] = sum_over_ranks([utterances, unusable])
    return values, reduced
