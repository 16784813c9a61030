"""The DDP engine: DistributedDataParallel, or the plain module in a single process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.engine.base import CanonicalState, StateReader
from w2vscale.engine.native import NativeEngine
from w2vscale.engine.rows import Rows
from w2vscale.optim.canonical import specs_of, stored


class DDPEngine(NativeEngine):
    """Every rank holds the full state. DDP averages gradients, so the loss is multiplied by the world size."""

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        precision: PrecisionConfig,
        device: torch.device,
        *,
        skips_parameters: bool,
    ) -> None:
        super().__init__(model, engine, optim, device)
        self.rows = Rows(device)
        self.parallel: DistributedDataParallel | None = None
        if not self.rows.alone:
            self.gradient_scale = dist.get_world_size()
            self.module = self.parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                init_sync=False,  # parameters are the same on all ranks by construction
                find_unused_parameters=skips_parameters,
            )
            # The step synchronises buffers. Not an argument: PyTorch 2.13 deprecates it, and 2.8 has no other.
            self.parallel.broadcast_buffers = False

    def reduce_gradients(self, last: bool) -> None:
        """Reduce gradients only in the last backward of a window, as with `no_sync`."""
        if self.parallel is not None:
            self.parallel.require_backward_grad_sync = last

    def export_state(self) -> CanonicalState:
        return {name: self.rows.own(stored(tensor)) for name, tensor in self.live_state().items()}

    @torch.no_grad()
    def import_state(self, reader: StateReader) -> None:
        state = self.live_state()
        for name, whole in self.rows.read(reader, specs_of(state)):
            state[name].copy_(whole)

    @torch.no_grad()
    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        state = self.live_state()
        for name, whole in values:
            state[f"model.{name}"].copy_(whole)
