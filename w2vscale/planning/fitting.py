"""Which forwards fit into the memory of a GPU."""

from __future__ import annotations

from w2vscale.data.plan import length_of_series, run_length
from w2vscale.planning.memory import demand
from w2vscale.planning.traffic import Sharding
from w2vscale.planning.work import Model

SHARE = 0.9
"""Of the memory of a GPU to use. The rest is a margin for fragmentation, as in `batch.concat=auto`."""

CONTEXT = 1.5e9
"""Bytes of a GPU that CUDA, cuBLAS and NCCL take beside what PyTorch allocates (assumed)."""


def usable(memory: float) -> float:
    """Return the bytes of a GPU with `memory` bytes that a run may allocate."""
    return SHARE * (memory - CONTEXT)


def per_forward(model: Model, sharding: Sharding, micro_batches: int, limit: float) -> int:
    """Return how many micro-batches of a rank share a forward, by `batch.concat`; 0 if not even one fits.

    With auto, it is the largest number that fits of those that `training.calibration` tries.
    """
    batch = model.config.batch
    if batch.concat == "auto":
        length = run_length(length_of_series(batch), per_rank=micro_batches)
        counts = [count for count in range(length, 0, -1) if length % count == 0]
    else:
        counts = [min(batch.concat, micro_batches)]
    several, alone = (demand(model, sharding, forwards=forwards) for forwards in (2, 1))
    for count in counts:
        needs = alone if count == micro_batches else several
        if needs.footprint(count * model.utterances).total <= limit:
            return count
    return 0
