"""Telling DTensors from other tensors in processes that may have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor, otherwise None. Imports the class, which takes seconds, only if it may be one."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
