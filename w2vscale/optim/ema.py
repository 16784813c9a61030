"""The exponential moving average of the trained parameters (Polyak & Juditsky 1992), for every engine.

It lies beside the AdamW moments of each tensor that the optimizer steps, so it is sharded and offloaded like them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

AVERAGE = "ema"
"""The key of the average in the optimizer state of a parameter."""
PART = 2**24
"""Elements of a flat tensor (of ZeRO) that are exchanged at once."""


@torch.no_grad()
def start_average(optimizer: torch.optim.Optimizer) -> None:
    """Set the average to the present parameters. Does nothing without an average."""
    for parameter, average in _pairs(optimizer):
        average.copy_(parameter)


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, norm: Tensor, decay: float) -> None:
    """Set the average to decay · average + (1 - decay) · parameter, in fp32, after a step. Nothing without an average.

    `norm` is the norm of the gradient, a scalar. If it is not finite, the step was skipped and the average stays as it
    is. The host need not know it.
    """
    weight = norm.isfinite() * (1.0 - decay)
    for parameter, average in _pairs(optimizer):
        average.lerp_(parameter, weight.to(average.device))


@torch.no_grad()
def exchange_average(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the values of parameters and average, bit for bit. Nothing without an average."""
    for parameter, average in _pairs(optimizer):
        parts = (x.split(PART) if x.dim() == 1 else (x,) for x in (parameter, average))
        for one, other in zip(*parts, strict=True):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)


def _pairs(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what this rank holds of each parameter and of its average."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            yield _local(parameter.detach()), _local(state[AVERAGE])


def _local(tensor: Tensor) -> Tensor:
    # Imported here because it takes seconds, and readers of checkpoints need only the name of the average.
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
