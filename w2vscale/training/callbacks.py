"""Functions of a user that a run calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Callbacks:
    """Functions that rank 0 calls in the training loop. An error that one of them raises ends the run.

    `on_update(update, metrics)`: after every log line (`logging.every`). `on_validation(update, metrics)`: after every
    validation, with the metrics of `data.validation`. `on_checkpoint(update, path)`: after every checkpoint; training
    waits until the checkpoint is complete.
    """

    on_update: Callable[[int, Metrics], object] | None = None
    on_validation: Callable[[int, Metrics], object] | None = None
    on_checkpoint: Callable[[int, Path], object] | None = None
