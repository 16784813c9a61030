"""An engine with initial values, and its updates, without the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from w2vscale.config import Config
from w2vscale.data.loading import TrainingData
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.engine import Engine, build_engine
from w2vscale.objectives import Objective, StepContext, Sums, build_objective, resolve
from w2vscale.objectives.base import empty_model, initial_state
from w2vscale.training.loop import _after_step
from w2vscale.training.run import open_training_set


@dataclass
class Setup:
    """What the settings of a run describe, on this process group."""

    config: Config
    objective: Objective
    engine: Engine

    @property
    def training_set(self) -> TrainingData:
        """What `data.train` names."""
        return open_training_set(self.config, self.objective)

    def window(
        self, window: Sequence[MicroBatch], denominator: float, *, update: int = 0, per_forward: int = 1
    ) -> Sums:
        """The sums of one window, whose gradients are accumulated."""
        return self.engine.run_window(
            window, self.objective, StepContext(self.config.trainer.seed, update),
            per_forward=per_forward, denominator=torch.tensor(denominator),
        )  # fmt: skip

    def evaluate(self, batch: MicroBatch) -> Sums:
        """The sums of one micro-batch."""
        return self.engine.evaluate(batch, self.objective, StepContext(self.config.trainer.seed, 0))

    def step(self, lr: float, max_norm: float | None = 1.0, *, update: int = 0) -> Tensor:
        """The gradient norm of one optimizer step, with what the objective does after it."""
        return self.engine.step(lr=lr, max_norm=max_norm, after=_after_step(self.objective, update))

    def start_over(self) -> None:
        """Give the engine its initial values."""
        self.engine.import_values(initial_state(self.objective, self.config.trainer.seed))

    def initial_values(self) -> list[tuple[str, Tensor]]:
        """Every parameter and buffer, whole."""
        return [(name, value.clone()) for name, value in initial_state(self.objective, self.config.trainer.seed)]


def set_up(
    config: Config, device: torch.device | str = "cpu", *, prepare: Callable[[nn.Module], None] = lambda model: None
) -> Setup:
    """Build the engine of a run and give it its initial values. `prepare` changes the model before."""
    config, objective = resolve(config)
    model = empty_model(objective)
    prepare(model)
    setup = Setup(config, objective, build_engine(model, config, objective, torch.device(device)))
    setup.start_over()
    return setup


def exported(engine: Engine) -> dict[str, Tensor]:
    """The state of an engine, with all tensors made. They may be live. Collective."""
    return {name: x.make() if isinstance(x, DeferredTensor) else x for name, x in engine.export_state().items()}


def filled_model(config: Config) -> Any:
    """The model of a run with its initial values, on the CPU."""
    objective = build_objective(config)
    model = objective.build_model()
    model.load_state_dict(dict(initial_state(objective, config.trainer.seed)))
    return model
