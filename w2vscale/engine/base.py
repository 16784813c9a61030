"""The contract between the training loop and whatever runs its updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.accumulation import Grouping
from w2vscale.objectives import Objective, StepContext, Sums

CanonicalState = dict[str, Tensor]
"""`model.<name>` of parameters and persistent buffers, `optim.<name>.{exp_avg,exp_avg_sq,step}` of trained parameters.

Floating-point tensors are fp32. They may be sharded in any way.
"""


class StateReader(Protocol):
    """Fills the tensors of a canonical state in place from a checkpoint."""

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Every tensor of `state` gets its stored value, or an error names it."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the global L2 norm before clipping, and whether the update was skipped."""

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """Owns the model, the optimizer, accumulation and sharding. All ranks make the same calls.

    Parameters with `requires_grad=False` are neither stepped nor decayed, and have no optimizer state. Buffers have
    their initial values, are the same on all ranks after every step, and are exported and imported.
    """

    def run_window(
        self, window: Sequence[MicroBatch], objective: Objective, step: StepContext, *,
        grouping: Grouping, denominator: Tensor,
    ) -> Sums:  # fmt: skip
        """Accumulate the gradient of the micro-batches of this rank; returns its sums.

        The gradient of an update is the sum over ranks and micro-batches of grad(total) / denominator.
        """

    def step(
        self, *, lr: float, max_norm: float | None, after: Callable[[nn.Module], None] | None = None
    ) -> StepResult:
        """Clip, step and clear gradients. A non-finite norm skips the step on every rank.

        `after` may change the model once it was stepped; parameters are those of the engine, sharded or not.
        """

    def evaluate(self, batch: MicroBatch, objective: Objective, step: StepContext) -> Sums:
        """Sums of this rank, without gradients and randomness. Sharded parameters are resharded before it returns."""

    def export_state(self) -> CanonicalState:
        """Collective. This rank's share of the state, to be written or copied before the next step: DTensors whose
        shards together are everything, or live tensors where there is one process.

        Every name of `expected_tensors`, and no other; a missing optimizer state is an error.
        """

    def import_state(self, reader: StateReader) -> None:
        """Collective. Replace parameters, buffers and optimizer state."""

    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Collective. Replace parameters and buffers by whole tensors, taken one at a time; the same on all ranks."""

    def close(self) -> None:
        """Release what the engine holds."""
