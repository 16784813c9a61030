"""DistributedDataParallel, or the plain module where there is one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from w2vscale.config import Config
from w2vscale.engine.base import CanonicalState, Criterion, EngineCaps, StateReader
from w2vscale.engine.native import NativeEngine
from w2vscale.engine.rows import Rows


class DDPEngine(NativeEngine):
    """Every rank holds everything; gradients are averaged, hence the factor of the world size."""

    caps = EngineCaps(name="ddp", sharded_parameters=False, sharded_optimizer=False)

    def __init__(self, model: nn.Module, criterion: Criterion, config: Config, device: torch.device) -> None:
        model.to_empty(device=device)
        self.parallel: DistributedDataParallel | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.gradient_scale = dist.get_world_size()
            joined = 1 if config.batch.concat == "auto" else config.batch.concat
            forwards = config.batch.micro_batches / (joined * dist.get_world_size())
            # LayerDrop leaves the parameters of skipped layers without gradients, freezing those of what is frozen.
            unused = (
                config.model.layerdrop > 0
                or config.model.feature_grad_mult == 0
                or config.ctc.freeze_encoder_updates > 0
            )
            self.parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # Parameters are the same on all ranks by construction.
                init_sync=False,
                find_unused_parameters=unused,
                # It does not go with accumulation.
                static_graph=not unused and forwards <= 1,
            )
        super().__init__(model, self.parallel or model, criterion, config, device)
        self.rows = Rows(device)

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced by a window's last backward."""
        return nullcontext() if last or self.parallel is None else self.parallel.no_sync()

    def clear_gradients(self) -> None:
        """Gradients that are views into the reduction's buckets stay."""
        self.optimizer.zero_grad(set_to_none=self.parallel is None)

    def export_state(self) -> CanonicalState:
        """See `Engine.export_state`."""
        return {name: self.rows.own(tensor) for name, tensor in self.live_state().items()}

    @torch.no_grad()
    def import_state(self, reader: StateReader) -> None:
        """See `Engine.import_state`."""
        state = self.live_state()
        for name, whole in self.rows.read(reader, {name: tensor.shape for name, tensor in state.items()}):
            state[name].copy_(whole)

    @torch.no_grad()
    def import_parameters(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.import_parameters`."""
        for name, whole in parameters:
            self.parameters[name].copy_(whole)

    def named_full_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.named_full_parameters`."""
        for name, parameter in self.parameters.items():
            yield name, parameter.detach().to(dtype)
