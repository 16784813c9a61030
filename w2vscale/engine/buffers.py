"""The buffers of a model on every engine: initialised, equal on all ranks, exported and imported."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2vscale.distributed.process_group import largest_over_ranks


class Buffers:
    """Remembers the values of a model's buffers while its parameters are laid out.

    An engine that casts a model casts its buffers, and `to_empty` loses them; `lay_out` puts them back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._versions: dict[str, tuple[int, int]] = {}

    def lay_out(self, device: torch.device) -> None:
        """Give the model its buffers, on `device` and in their own types."""
        for name, value in self._values.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = value.to(device, copy=True)
        self._values.clear()
        self._versions = self._now()

    def persistent(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every buffer that belongs into a checkpoint."""
        for prefix, module in self.model.named_modules():
            for own, buffer in module._buffers.items():
                if buffer is not None and own not in module._non_persistent_buffers_set:
                    yield (f"{prefix}.{own}" if prefix else own), buffer

    def synchronize(self) -> None:
        """Give all ranks the buffers of rank 0, where any rank has changed them since the last call. Collective.

        As in DistributedDataParallel: the statistics of a BatchNorm are those of rank 0.
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
