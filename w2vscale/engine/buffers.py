"""Model buffers, handled in the same way by every engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buffers:
    """Keeps the values of model buffers while an engine sets up the parameters.

    `to_empty` loses the values of buffers, and casting a model also casts its buffers. `lay_out` restores them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._stored = [name for name, _ in model.named_buffers() if name in model.state_dict()]
        self._values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
        self._names = dict(model.named_buffers(remove_duplicate=False))  # a buffer may have several

    def lay_out(self, device: torch.device) -> None:
        """Restore the buffers, on `device` and with their original dtypes."""
        values = {buffer: value.to(device, copy=True) for buffer, value in self._values.items()}
        for name, buffer in self._names.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = values[buffer]
        self._values.clear()
        self._names.clear()

    def persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of every persistent buffer; one with several names comes under the first."""
        return ((name, self.model.get_buffer(name)) for name in self._stored)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Give all ranks the buffers of rank 0. Collective.

        As in DistributedDataParallel: the statistics of a BatchNorm are those of rank 0. Which buffers have changed
        cannot be known: `F.batch_norm` does not raise the version of a tensor that it changes.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Give all buffers their present values again when the block ends."""
        values = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        yield
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
