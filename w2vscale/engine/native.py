"""Base class of the DDP and FSDP2 engines: a PyTorch module stepped by a PyTorch optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from w2vscale.config import EngineConfig, OptimConfig
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.accumulation import Forward, accumulate, split
from w2vscale.engine.base import AfterStep, CanonicalState, StateReader, StoredState
from w2vscale.engine.buffers import Buffers
from w2vscale.engine.transforms import compiles, transform
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.objectives.details import Details
from w2vscale.optim.adamw import (
    allocate_state,
    clip_and_step,
    make_adamw,
    parameter_groups,
    set_learning_rate,
    state_of,
)
from w2vscale.optim.ema import AVERAGE, exchange_average, start_average, update_average


class NativeEngine(ABC):
    """Runs forward, backward and step of `module`, which is `model` or wraps it. Subclasses reduce the gradients."""

    gradient_scale = 1.0
    """Multiplies the loss, to undo a division in the gradient reduction."""

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        device: torch.device,
        shard: Callable[[Any], None] | None = None,
    ) -> None:
        self.model = self.module = model
        self.device = device
        self.buffers = Buffers(model)
        self.compiled = compiles(engine, device)
        transform(model, engine, compiled=self.compiled, shard=shard)
        model.to_empty(device="cpu" if engine.offload else device)
        self.buffers.lay_out(device)
        # Collected once, because FSDP puts other objects in their place while parameters are gathered.
        self.parameters = dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        shapes = [(name, parameter.shape) for name, parameter in self.trained.items()]
        self.optimizer = make_adamw(self.trained, parameter_groups(shapes, optim), optim)
        self.ema_decay = optim.ema_decay
        allocate_state(self.optimizer, self.trained.values(), average=self.ema_decay > 0)

    @abstractmethod
    def reduce_gradients(self, last: bool) -> None:
        """Decide whether the next backward reduces gradients. `last`: it is the last one of the window."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss` to that of the window, and reduce it if `reduce_gradients` says so."""
        loss.backward()

    def run_window(
        self, window: Sequence[MicroBatch], objective: Objective, step: StepContext, *,
        per_forward: int, denominator: Tensor, between_forwards: Callable[[], None] | None = None,
    ) -> Sums:  # fmt: skip
        self.module.train()
        scale = self.gradient_scale / denominator

        def run(one: Forward) -> Sums:
            self.reduce_gradients(one.last)
            sums = objective.forward(self.module, one.inputs, step=one.step, training=True)
            self.backward(sums.total * scale, one.last)
            return sums

        return accumulate(split(window, per_forward), step, run, self.device, between_forwards)

    def step(self, *, lr: float, max_norm: float | None, after: AfterStep | None = None) -> Tensor:
        gradients = []
        for parameter in self.trained.values():
            if parameter.grad is None:  # LayerDrop skipped its layer; on every engine this means a zero gradient
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        set_learning_rate(self.optimizer, lr)
        clip_and_step(self.optimizer, norm, max_norm)
        if after is not None and math.isfinite(norm):  # waits for the device
            with torch.no_grad():
                after(self.model)
        update_average(self.optimizer, norm, self.ema_decay)
        # The gradients of a wrapped model are views into the buckets of its reduction: they are zeroed and kept.
        self.optimizer.zero_grad(set_to_none=self.module is self.model)
        self.buffers.synchronize()
        return norm.to(self.device)  # with `engine.offload` it was computed on the host

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, objective: Objective, step: StepContext) -> Sums:
        self.model.eval()
        run = lambda one: objective.forward(self.model, one.inputs, step=one.step, training=False)  # noqa: E731
        return accumulate([[batch]], step, run, self.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        exchange_average(self.optimizer)
        try:
            yield
        finally:
            exchange_average(self.optimizer)

    @torch.no_grad()
    def inspect(
        self, batch: MicroBatch, objective: Objective, *, samples: int, blocks: Sequence[int]
    ) -> Details | None:
        self.model.eval()
        inputs = to_device(batch.inputs, self.device)
        return objective.inspect(self.model, inputs, samples=samples, blocks=blocks)

    def live_state(self) -> CanonicalState:
        """Return parameters, buffers, optimizer state and average, without copying, by their canonical names."""
        state: CanonicalState = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= {f"model.{name}": buffer for name, buffer in self.buffers.persistent()}
        for name, parameter in self.trained.items():
            for key, value in state_of(self.optimizer, name, parameter).items():
                state[f"ema.{name}" if key == AVERAGE else f"optim.{name}.{key}"] = value
        return state

    def import_state(self, reader: StoredState) -> None:
        state = self.live_state()
        self._read(reader, {name: x for name, x in state.items() if reader.has_average or not name.startswith("ema.")})
        if not reader.has_average:
            start_average(self.optimizer)

    def import_model(self, reader: StateReader, names: Iterable[str]) -> None:
        state = self.live_state()
        self._read(reader, {f"model.{name}": state[f"model.{name}"] for name in names})
        start_average(self.optimizer)

    @abstractmethod
    def _read(self, reader: StateReader, state: CanonicalState) -> None:
        """Fill tensors of the live state, each rank its share, with memory for a part of them. Collective."""

    def close(self) -> None:
        self.module = self.model
