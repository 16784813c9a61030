"""The DDP engine: DistributedDataParallel, or the plain module in a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import CanonicalState, ExportedState, StateReader
from w2vscale.engine.native import NativeEngine
from w2vscale.engine.reduction import reduces_in_bf16, sum_bucket
from w2vscale.engine.rows import Rows
from w2vscale.models.layers import compute_dtype, weights_cast_once
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.optim.canonical import specs_of, stored
from w2vscale.optim.ema import start_average


class _UsingAll(torch.autograd.Function):
    """Returns `loss`, and makes its backward visit all `parameters`, which get no gradient from here.

    DDP reduces a bucket once the backward has visited all of its parameters, so those of skipped layers must be visited
    too. They are the same on all ranks, so DDP need not search for them (`find_unused_parameters`).
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.count = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.count


class DDPEngine(NativeEngine):
    """Every rank holds the full state. DDP averages gradients, so the loss is multiplied by the world size.

    With `precision.reduce=bf16` they are summed.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        precision: PrecisionConfig,
        device: torch.device,
    ) -> None:
        super().__init__(model, engine, optim, device)
        self.compute_dtype = compute_dtype(precision)
        self.rows = Rows(device)
        self.parallel: DistributedDataParallel | None = None
        if not self.rows.alone:
            self.gradient_scale = dist.get_world_size()
            self.module = self.parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                init_sync=False,  # parameters are the same on all ranks by construction
            )
            # The step synchronises buffers. Not an argument: PyTorch 2.13 deprecates it, and 2.11 has no other.
            self.parallel.broadcast_buffers = False
            if reduces_in_bf16(precision):
                self.gradient_scale = 1.0
                # A lambda, because DDP refuses annotations that are strings.
                self.parallel.register_comm_hook(None, lambda _, bucket: sum_bucket(bucket))
            self._order_buckets(self.parallel)

    def run_window(
        self, window: Sequence[MicroBatch], objective: Objective, step: StepContext, *,
        per_forward: int, denominator: Tensor, between_forwards: Callable[[], None] | None = None,
    ) -> Sums:  # fmt: skip
        with weights_cast_once(self.model, self.compute_dtype):
            return super().run_window(
                window, objective, step,
                per_forward=per_forward, denominator=denominator, between_forwards=between_forwards,
            )  # fmt: skip

    def reduce_gradients(self, last: bool) -> None:
        """Reduce gradients only in the last backward of a window, as with `no_sync`."""
        if self.parallel is not None:
            self.parallel.require_backward_grad_sync = last

    def backward(self, loss: Tensor, last: bool) -> None:
        if last and self.parallel is not None:
            loss = _UsingAll.apply(loss, *self.trained.values())
        loss.backward()

    def _order_buckets(self, parallel: DistributedDataParallel) -> None:
        """Reduce gradients of zero, so that DDP builds its buckets from the last layer to the first. Collective.

        It orders them by the arrival of the first gradients. In an update that skips layers theirs arrive first, and in
        all later updates no bucket could be reduced before these layers are reached.
        """
        loss = torch.zeros((), device=self.device, requires_grad=True)
        for parameter in self.trained.values():
            loss = _UsingAll.apply(loss, parameter)
        parallel.reducer.prepare_for_backward([])
        loss.backward()

    def export_state(self) -> ExportedState:
        return {name: self.rows.own(stored(tensor)) for name, tensor in self.live_state().items()}

    @torch.no_grad()
    def _read(self, reader: StateReader, state: CanonicalState) -> None:
        for name, whole in self.rows.read(reader, specs_of(state)):
            state[name].copy_(whole)

    @torch.no_grad()
    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        state = self.live_state()
        for name, whole in values:
            state[f"model.{name}"].copy_(whole)
        start_average(self.optimizer)
