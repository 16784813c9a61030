"""Validate a model on a whole corpus, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import sum_over_ranks
from w2vscale.objectives import Sums, add_sums


def reduce_sums(sums: Any) -> Any:
    """Add up sums over all ranks, in float64 on the CPU. Collective."""
    flat = torch.cat([field.detach().double().flatten().cpu() for field in sums])
    reduced = torch.tensor(sum_over_ranks(flat.tolist()), dtype=torch.float64)
    parts = reduced.split([field.numel() for field in sums])
    return type(sums)(*(part.view(field.shape) for part, field in zip(parts, sums, strict=True)))


def validate(
    evaluate: Callable[[MicroBatch], Sums], batches: Iterable[MicroBatch], metrics: Callable[[Any], dict[str, float]]
) -> dict[str, float]:
    """Metrics over the batches of all ranks. Collective."""
    total: Any = None
    utterances = unusable = 0
    for batch in batches:
        sums = evaluate(batch)
        total = sums if total is None else add_sums(total, sums)
        utterances += batch.utterances
        unusable += sum(audio.left_out for audio in batch.bad)
    assert total is not None
    values = metrics(reduce_sums(total))
    values["utterances"], values["unusable_utterances"] = sum_over_ranks([utterances, unusable])
    return values
