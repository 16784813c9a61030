"""What each engine holds on a rank, in bytes (Rajbhandari et al. 2020, arXiv:1910.02054, section 3)."""

from __future__ import annotations

from typing import NamedTuple

from w2vscale.planning.traffic import FP32, Sharding
from w2vscale.planning.work import Model


class State(NamedTuple):
    """Bytes that a rank holds between the last backward of an update and the optimizer step."""

    parameters: float  # working weights
    masters: float  # fp32 weights beside them
    gradients: float
    moments: float  # of AdamW
    average: float  # of the weights, with `optim.ema_decay`


def state_of(model: Model, sharding: Sharding) -> State:
    """Return what a rank holds, as the table of docs/engines.md says. Where it is offloaded, it is in host memory."""
    width, ranks = sharding.working_bytes, sharding.shard_size
    trained, frozen = FP32 * float(model.trained), FP32 * float(model.parameters - model.trained)
    share = trained / ranks
    kept = 1.0 if model.config.optim.ema_decay else 0.0
    if sharding.engine == "ddp":
        return State(trained + frozen, 0.0, trained, 2.0 * trained, kept * trained)
    working = width * float(model.trained) + frozen  # DeepSpeed keeps frozen weights in fp32
    if sharding.engine == "zero1":
        last = width * float(model.trained) if width < FP32 else 0.0  # gradients of the last backward, beside the sums
        return State(working, share, trained + last, 2.0 * share, kept * share)
    if sharding.engine == "zero2":
        return State(working, share, share, 2.0 * share, kept * share)
    if sharding.engine == "zero3":
        return State(working / ranks, share, share, 2.0 * share, kept * share)
    padded = [unit.padded(ranks) for unit in model.units]
    changing = sum(max(size - unit.frozen, 0) for size, unit in zip(padded, model.units, strict=True))
    share = FP32 * float(changing) / ranks
    return State(FP32 * float(sum(padded)) / ranks, 0.0, share, 2.0 * share, kept * share)
