"""Sums of gradients over ranks in bf16 (`precision.reduce=bf16`): half of the bytes, and everything else stays fp32.

Each rank rounds its gradient to bf16. The library then adds in bf16 on the way, so that a sum is rounded again wherever
two parts meet. The sum goes back into an fp32 tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w2vscale.config import PrecisionConfig

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""PyTorch 2.13 deprecates `reduce_scatter_tensor`, and 2.11 has no other."""


def reduces_in_bf16(precision: PrecisionConfig) -> bool:
    """Whether gradients are sent in bf16. A single process sends none."""
    return precision.reduce == "bf16" and dist.is_initialized() and dist.get_world_size() > 1


def sum_bucket(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of DistributedDataParallel over all ranks in bf16, in place: a communication hook.

    DDP averages gradients, but not those that a hook has reduced.
    """
    whole = bucket.buffer()
    work: Any = dist.all_reduce(whole.bfloat16(), async_op=True)

    def widen(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return whole.copy_(done.value()[0])

    return work.get_future().then(widen)


class Bf16ReduceScatter:
    """Replaces the reduce-scatter of FSDP2: fp32 in and out, bf16 between ranks."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate an input or output of the reduction, as FSDP2 does itself."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        reduce_scatter(received, input_tensor.bfloat16(), group=group, op=op)
        output_tensor.copy_(received)


class SumOverReplicas:
    """Sums the sharded gradient of one FSDP2 unit over the replicas of hybrid sharding, once per window.

    FSDP2 calls it with the output of each reduce-scatter, and then adds that to the gradient. The hybrid sharding of
    FSDP2 itself would accumulate these sums in the type in which it sends them.
    """

    def __init__(self, replicas: dist.ProcessGroup) -> None:
        self.replicas = replicas
        self.last = True  # whether this is the last backward of the window
        self.waiting: Tensor | None = None  # sum of the backwards before

    def __call__(self, output: Tensor) -> None:
        if output.device.type == "cuda":  # allocated on the stream of the reduce-scatter
            output.record_stream(torch.cuda.current_stream(output.device))
        if not self.last:
            self.waiting = output.clone() if self.waiting is None else self.waiting.add_(output)
            output.zero_()
            return
        if self.waiting is not None:
            output.add_(self.waiting)
            self.waiting = None
        sent = output.bfloat16()
        dist.all_reduce(sent, group=self.replicas)
        output.copy_(sent)
