"""What offloading costs: copies between a GPU and host memory, and an optimizer step on the host.

Nothing of it is assumed to overlap with computing.
"""

from __future__ import annotations

from typing import NamedTuple

from w2vscale.planning.links import Cluster
from w2vscale.planning.traffic import FP32, Sharding
from w2vscale.planning.work import Model

ADAMW_BYTES = 28
"""Memory traffic of AdamW per parameter: it reads weight, gradient and moments, and writes all but the gradient."""


class Offloading(NamedTuple):
    """Additional seconds of a forward and of a backward, and those of an optimizer step of the whole model on a host.

    `step` is None where the GPUs step.
    """

    forward: float = 0.0
    backward: float = 0.0
    step: float | None = None


def offloading(model: Model, sharding: Sharding, forwards: int, cluster: Cluster) -> Offloading:
    """Return what an engine pays for what it keeps in host memory."""
    if not sharding.offloads:
        return Offloading()
    share, width = model.parameters / sharding.shard_size, sharding.working_bytes
    gathers = {"zero2": 0.0, "zero3": width * share}.get(sharding.engine, FP32 * share)
    # ZeRO-2 adds to gradients on the GPU, so that they go there and back.
    gradients = FP32 * share * (2 if sharding.engine == "zero2" and forwards > 1 else 1)
    ranks_here = min(sharding.ranks, cluster.gpus_per_node)
    step = model.trained * ADAMW_BYTES * ranks_here / cluster.host_bandwidth + FP32 * model.parameters / cluster.pcie
    return Offloading(gathers / cluster.pcie, (gathers + gradients) / cluster.pcie, step)
