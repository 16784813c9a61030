"""The interface of a logger, and the values that it takes.

What a run logs is a function of its settings and data. So after a resume the same things are logged a second time from
the checkpoint on, and every logger makes sure that it ends up with each of them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.checkpoint.format import TrainState
from w2vscale.loggers.tags import Tags


@dataclass(frozen=True)
class RunFacts:
    """What loggers need to know of a run."""

    exp: Path
    settings: Mapping[str, Mapping[str, Any]]  # by section
    tags: Tags


@dataclass(frozen=True)
class Audio:
    """One channel of samples in [-1, 1]."""

    waveform_S: NDArray[np.float32]
    sampling_rate: int


@dataclass(frozen=True)
class Histogram:
    """`counts` [N] of values between neighbouring `edges` [N + 1], their sum and the sum of their squares."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    square_total: float


class Logger:
    """Takes what a run logs, update by update. By default it ignores everything.

    `update` never decreases, except that `continue_from` goes back. Names of texts, pictures and audio have a `/`
    between group and name and are unique in an update.
    """

    def continue_from(self, state: TrainState) -> None:
        """Prepare for what comes after `state`: what was logged after it will be logged again."""

    def prepare(self) -> None:
        """Updates follow: do now what takes seconds, so that it is not part of their time."""

    def scalars(self, split: str, update: int, values: Mapping[str, float]) -> None:
        """Log metrics of one split (`train`, `validation`). They may be NaN."""

    def text(self, name: str, update: int, text: str) -> None:
        """Log a text."""

    def image(self, name: str, update: int, png: bytes) -> None:
        """Log a picture."""

    def audio(self, name: str, update: int, audio: Audio) -> None:
        """Log a piece of audio."""

    def histogram(self, name: str, update: int, histogram: Histogram) -> None:
        """Log a distribution."""

    def commit(self, update: int) -> None:
        """Everything of `update` has been logged; called before its checkpoint is saved."""

    def finish(self) -> None:
        """The run is complete. Only `close` follows."""

    def close(self) -> None:
        """Close files and connections."""
