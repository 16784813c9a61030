"""Model buffers, handled in the same way by every engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buffers:
    """Keeps the values of model buffers while an engine sets up the parameters.

    `to_empty` loses the values of buffers, and casting a model also casts its buffers. `lay_out` restores them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def lay_out(self, device: torch.device) -> None:
        """Restore the buffers, on `device` and with their original dtypes."""
        for name, value in self._values.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = value.to(device, copy=True)
        self._values.clear()

    def persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of every persistent buffer."""
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
