"""The buffers of a model on every engine: initialised, equal on all ranks, exported and imported."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buffers:
    """Remembers the values of a model's buffers while its parameters are laid out.

    An engine that casts a model casts its buffers, and `to_empty` loses them; `lay_out` puts them back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def lay_out(self, device: torch.device) -> None:
        """Give the model its buffers, on `device` and in their own types."""
        for name, value in self._values.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = value.to(device, copy=True)
        self._values.clear()

    def persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every buffer that belongs into a checkpoint."""
        for prefix, module in self.model.named_modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and own not in module._non_persistent_buffers_set:
                    yield (f"{prefix}.{own}" if prefix else own), buffer

    @torch.no_grad()
    def synchronize(self) -> None:
        """Give all ranks the buffers of rank 0. Collective.

        As in DistributedDataParallel: the statistics of a BatchNorm are those of rank 0. Which buffers have changed
        cannot be known: `F.batch_norm` does not raise the version of a tensor that it changes.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for _, buffer in self.model.named_buffers():
            dist.broadcast(buffer, src=0)
