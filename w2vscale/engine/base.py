"""The contract between the training loop and whatever runs its updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.joining import Joining
from w2vscale.objectives.contrastive_model import LossSums
from w2vscale.objectives.ctc import CtcSums

Sums = LossSums | CtcSums
"""An objective's sums: `total` is what is differentiated, and `plus` adds them up."""

CanonicalState = dict[str, Tensor]
"""`model.<name>`, `optim.<name>.{exp_avg,exp_avg_sq,step}`: fp32, sharded or not, keyed by parameter name."""


class StateReader(Protocol):
    """Fills the tensors of a canonical state in place from a checkpoint."""

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Every tensor of `state` gets its stored value, or an error names it."""


class Criterion(Protocol):
    """Runs a module on micro-batches that share one forward, with everything drawn for them."""

    def __call__(self, module: nn.Module, chunk: Sequence[MicroBatch], *, device: torch.device, training: bool) -> Sums:
        """Loss sums on this rank."""


@dataclass(frozen=True)
class EngineCaps:
    """Facts about an engine that others may ask for."""

    name: str
    sharded_parameters: bool
    sharded_optimizer: bool


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the global L2 norm before clipping, and whether the update was skipped."""

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """Owns the model, the optimizer, accumulation and sharding. All ranks make the same calls."""

    caps: EngineCaps
    criterion: Criterion
    joining: Joining
    """Which micro-batches share a forward."""

    def run_window(self, window: Sequence[MicroBatch], denominator: Tensor) -> Sums:
        """Accumulate the gradient of this rank's micro-batches; returns this rank's sums.

        The gradient of an update is the sum over ranks and micro-batches of grad(total) / denominator.
        """

    def step(self, *, lr: float, max_norm: float | None) -> StepResult:
        """Clip, step and clear gradients. A non-finite norm skips the step on every rank."""

    def evaluate(self, batch: MicroBatch) -> Sums:
        """This rank's sums, without gradients, dropout, LayerDrop or noise. Sharded parameters are resharded
        before it returns."""

    def export_state(self) -> CanonicalState:
        """Collective. This rank's share of parameters and optimizer state, to be written or copied before the next
        step: DTensors whose shards together are everything, or live tensors where there is one process. Every name and
        shape of `canonical_shapes`, and no other; a missing optimizer state is an error."""

    def import_state(self, reader: StateReader) -> None:
        """Collective. Replace parameters and optimizer state."""

    def import_parameters(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Collective. Replace parameters by whole tensors, taken one at a time; the same on all ranks."""

    def named_full_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one at a time; all ranks iterate."""

    def close(self) -> None:
        """Release what the engine holds."""
