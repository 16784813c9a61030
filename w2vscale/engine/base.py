"""The `Engine` protocol: the contract between the training loop and the backend that runs its updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.engine.buffers import Buffers
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.objectives.details import Details

CanonicalState = dict[str, Tensor]
"""`model.<name>` of parameters and persistent buffers, `optim.<name>.{exp_avg,exp_avg_sq,step}` of trained parameters.

With `optim.ema_decay`, also their averages `ema.<name>`. Floating-point tensors are fp32. Tensors may be sharded in any
way.
"""

ExportedState = dict[str, Tensor | DeferredTensor]
"""A canonical state to write: of each tensor what this rank holds, in memory or made when it is needed."""

AfterStep = Callable[[nn.Module], None]
"""Changes the model after a step. It sees the parameters as the engine holds them, which may be sharded."""


class StateReader(Protocol):
    """Reads the tensors of a canonical state from a checkpoint, in place."""

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fill every tensor of `state` with its stored value, or raise an error that names it. Collective."""


class StoredState(StateReader, Protocol):
    """Reads the whole state of a run from a checkpoint."""

    @property
    def has_average(self) -> bool:
        """Whether it holds the moving average of the parameters."""


class Engine(Protocol):
    """Owns the model, the optimizer, gradient accumulation and sharding. All ranks must make the same calls.

    Parameters with `requires_grad=False` never change and have no optimizer state. Buffers keep their initial values
    until training changes them, are equal on all ranks after every step, and are part of the exported state.
    With `optim.ema_decay`, every step that is not skipped updates a moving average of the trained parameters. It starts
    from the parameters that are imported. Buffers are not averaged.
    """

    buffers: Buffers
    compiled: bool  # whether the feature encoder and the transformer blocks are compiled

    def run_window(
        self, window: Sequence[MicroBatch], objective: Objective, step: StepContext, *,
        per_forward: int, denominator: Tensor, between_forwards: Callable[[], None] | None = None,
    ) -> Sums:  # fmt: skip
        """Accumulate the gradient of this rank's micro-batches and return their sums.

        `per_forward` consecutive micro-batches share a forward; the same number on all ranks. `between_forwards` is
        called between two of them. If it raises an error, on all ranks, the gradient is lost and the state can be
        exported.
        The gradient of an update is the sum of grad(total) / denominator over all ranks and micro-batches.
        """

    def step(self, *, lr: float, max_norm: float | None, after: AfterStep | None = None) -> Tensor:
        """Clip gradients, step and clear gradients. Return the global L2 norm of the gradient before clipping.

        The norm is a scalar on the device of the engine. If it is not finite, every rank skips the step: parameters and
        optimizer state stay as they are. `after` is called after a step that was not skipped. Without it, DDP and FSDP2
        do not wait for the device.
        """

    def evaluate(self, batch: MicroBatch, objective: Objective, step: StepContext) -> Sums:
        """Compute the sums of this rank, without gradients or randomness. Parameters are resharded on return."""

    def averaged(self) -> AbstractContextManager[None]:
        """Evaluate the moving average of the parameters in the block, if there is one. Collective.

        After it, the parameters are again what they were, bit for bit. Nothing else may be called in the block. After
        an error in it, the state can be exported, and nothing else be done.
        """

    def inspect(
        self, batch: MicroBatch, objective: Objective, *, samples: int, blocks: Sequence[int]
    ) -> Details | None:
        """Return what the objective shows of a micro-batch of this rank: see `Objective.inspect`. Collective.

        Like `evaluate`, it has no gradients or randomness, and parameters are resharded on return.
        """

    def export_state(self) -> ExportedState:
        """Return this rank's share of the state, without copying it. Collective.

        Names are exactly those of `expected_tensors`, in the same order on all ranks; missing optimizer state is an
        error. With several processes the tensors are DTensors that together hold the full state. Those in memory are
        live: write or copy them, and make the deferred ones, before the next step.
        """

    def import_state(self, reader: StoredState) -> None:
        """Replace parameters, buffers, optimizer state and average by those of a checkpoint. Collective.

        An average that the checkpoint does not have starts from its parameters.
        """

    def import_model(self, reader: StateReader, names: Iterable[str]) -> None:
        """Replace these parameters and buffers by those of another model. Each rank reads what it holds. Collective."""

    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Replace parameters and buffers by whole tensors, consumed one at a time; equal on all ranks. Collective."""

    def close(self) -> None:
        """Release the resources of the engine."""
