"""What PyTorch's own engines share: a module whose parameters an ordinary optimizer steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import CanonicalState, Criterion, EngineCaps, StepResult, Sums
from w2vscale.engine.joining import joining
from w2vscale.engine.window import accumulate
from w2vscale.optim.adamw import allocate_state, make_adamw, parameter_groups, set_learning_rate, state_of


class NativeEngine(ABC):
    """Forward, backward and step over `module`, which wraps or is `model`. Subclasses say how gradients meet."""

    caps: EngineCaps
    gradient_scale = 1.0
    """Factor of the loss: what the gradients' reduction divides by."""

    def __init__(
        self, model: nn.Module, module: nn.Module, criterion: Criterion, config: Config, device: torch.device
    ) -> None:
        self.model, self.module, self.criterion, self.device = model, module, criterion, device
        self.joining = joining(config.batch.concat)
        # Taken once: the model of a sharding engine has other objects in their place while they are gathered.
        self.parameters = dict(model.named_parameters())
        shapes = [(name, parameter.shape) for name, parameter in self.parameters.items()]
        self.optimizer = make_adamw(self.parameters, parameter_groups(shapes, config.optim), config.optim)
        allocate_state(self.optimizer, self.parameters.values())

    @abstractmethod
    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward, of which `last` is the window's last: when gradients are reduced."""

    def run_window(self, window: Sequence[MicroBatch], denominator: Tensor) -> Sums:
        """See `Engine.run_window`."""
        self.module.train()
        scale = self.gradient_scale / denominator

        def run(chunk: Sequence[MicroBatch], last: bool) -> Sums:
            with self.reducing(last):
                sums = self.criterion(self.module, chunk, device=self.device, training=True)
                (sums.total * scale).backward()
            return sums

        return accumulate(self.joining.chunks(window), run, self.device)

    def step(self, *, lr: float, max_norm: float | None) -> StepResult:
        """See `Engine.step`."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a skipped layer: its gradient is zero on every engine
                parameter.grad = torch.zeros_like(parameter)
        total = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm, foreach=True)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if finite := math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.clear_gradients()
        return StepResult(norm, skipped=not finite)

    def clear_gradients(self) -> None:
        """Make ready for the next window."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Sums:
        """See `Engine.evaluate`."""
        self.model.eval()
        return self.criterion(self.model, [batch], device=self.device, training=False)

    def live_state(self) -> CanonicalState:
        """The parameters and the optimizer's state, under their canonical names."""
        state: CanonicalState = {}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.detach()
            for key, value in state_of(self.optimizer, name, parameter).items():
                state[f"optim.{name}.{key}"] = value
        return state

    def close(self) -> None:
        """See `Engine.close`."""
        self.module = self.model
