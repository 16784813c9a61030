"""Model buffers, handled in the same way by every engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2vscale.distributed.process_group import largest_over_ranks


class Buffers:
    """Keeps the values of model buffers while an engine sets up the parameters.

    `to_empty` loses the values of buffers, and casting a model also casts its buffers. `lay_out` restores them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._versions: dict[str, tuple[int, int]] = {}

    def lay_out(self, device: torch.device) -> None:
        """Restore the buffers, on `device` and with their original dtypes."""
        for name, value in self._values.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = value.to(device, copy=True)
        self._values.clear()
        self._versions = self._now()

    def persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of every persistent buffer."""
        for prefix, module in self.model.named_modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and own not in module._non_persistent_buffers_set:
                    yield (f"{prefix}.{own}" if prefix else own), buffer

    def synchronize(self) -> None:
        """Broadcast the buffers that any rank has changed since the last call from rank 0. Collective.

        DistributedDataParallel does the same: BatchNorm statistics are those of rank 0.
        """
        if not self._versions or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        now = self._now()
        changed = largest_over_ranks([now[name] != self._versions.get(name) for name in now])
        for (_, buffer), is_changed in zip(self.model.named_buffers(), changed, strict=True):
            if is_changed:
                dist.broadcast(buffer, src=0)
        self._versions = self._now()

    def _now(self) -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in self.model.named_buffers()}
