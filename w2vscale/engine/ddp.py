"""DistributedDataParallel, or the plain module where there is one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import CanonicalState, Criterion, EngineCaps, StateReader, StepResult
from w2vscale.models.wav2vec2 import LossSums
from w2vscale.optim.adamw import make_adamw, set_learning_rate


class DDPEngine:
    """Every rank holds everything; gradients are summed."""

    caps = EngineCaps(name="ddp", sharded_parameters=False, sharded_optimizer=False)

    def __init__(self, model: nn.Module, criterion: Criterion, config: Config, device: torch.device) -> None:
        self.device = device
        self.criterion = criterion
        self.concat = config.batch.concat
        self.model = model.to(device)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.module: nn.Module = self.model
        if self.world_size > 1:
            self.module = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # LayerDrop leaves the parameters of skipped layers without gradients.
                find_unused_parameters=config.model.layerdrop > 0,
            )
        self.optimizer = make_adamw(self.model.named_parameters(), config.optim)

    def run_window(self, window: Sequence[MicroBatch], denominator: Tensor) -> LossSums:
        """See `Engine.run_window`. DDP averages gradients, hence the factor of the world size."""
        chunks = [window[i : i + self.concat] for i in range(0, len(window), self.concat)]
        self.module.train()
        window_sums: LossSums | None = None
        for chunk in chunks:
            accumulate = self.world_size > 1 and chunk is not chunks[-1]
            with self.module.no_sync() if accumulate else nullcontext():  # type: ignore[operator]
                sums = self.criterion(self.module, chunk, device=self.device, training=True)
                (sums.total * (self.world_size / denominator)).backward()
            sums = sums._replace(total=sums.total.detach())
            window_sums = sums if window_sums is None else window_sums.plus(sums)
        assert window_sums is not None
        return window_sums

    def step(self, *, lr: float, max_norm: float | None) -> StepResult:
        """See `Engine.step`."""
        parameters = list(self.model.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # a skipped layer: its gradient is zero, as it is where gradients are sharded
                parameter.grad = torch.zeros_like(parameter)
        limit = float("inf") if max_norm is None else max_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
        skipped = norm != norm or norm == float("inf")
        if not skipped:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.world_size == 1)
        return StepResult(norm, skipped)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> LossSums:
        """See `Engine.evaluate`."""
        self.model.eval()
        return self.criterion(self.model, [batch], device=self.device, training=False)

    def export_state(self) -> CanonicalState:
        """See `Engine.export_state`."""
        state: CanonicalState = {}
        for name, parameter in self.model.named_parameters():
            state[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                state[f"optim.{name}.{key}"] = value
        return state

    def import_state(self, reader: StateReader) -> None:
        """See `Engine.import_state`."""
        reader.read_into(self.export_state())

    def named_full_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.named_full_parameters`."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(dtype)

    def close(self) -> None:
        """See `Engine.close`."""
        self.module = self.model
