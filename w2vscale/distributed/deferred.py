"""Tensors of a state that are made when they are needed: gathered from the ranks, or copied from a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeferredTensor:
    """What this rank holds of a tensor, in host memory of its own, once it is made.

    `like` is the same tensor on the meta device: a DTensor if the ranks hold different parts. `make` may be collective,
    so all ranks make all deferred tensors of a state, in its order.
    """

    like: Tensor
    make: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.like.dtype
