"""What an engine needs on one rank, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2vscale.planning.timeline import Timeline

Bytes = NDArray[np.float64]
"""One number for each moment of a timeline."""


class Footprint(NamedTuple):
    """Bytes on one GPU when it holds most, and in host memory for each GPU."""

    parameters: float  # working and master weights
    gradients: float
    moments: float  # of AdamW, and the average of the weights
    activations: float  # with temporary tensors of the model
    buffers: float  # copies of weights, gathered weights, buckets
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.parameters + self.gradients + self.moments + self.activations + self.buffers


@dataclass(frozen=True)
class Demand:
    """What an engine needs beside activations."""

    timeline: Timeline
    parameters: float
    moments: float
    gradients: Bytes
    buffers: Bytes
    elsewhere: tuple[Footprint, ...] = ()  # outside of forward and backward: in the optimizer step, or at the start
    host: float = 0.0

    def footprint(self, utterances: float) -> Footprint:
        """Return the bytes at the peak, with this number of utterances in a forward."""
        live = self.timeline.live(utterances)
        peak = int(np.argmax(live + self.gradients + self.buffers))
        there = Footprint(
            self.parameters,
            float(self.gradients[peak]),
            self.moments,
            float(live[peak]),
            float(self.buffers[peak]),
        )
        most = max([there, *self.elsewhere], key=lambda one: one.total)
        return most._replace(host=self.host)

    def longest(self, limit: float) -> float:
        """Return how many utterances fit into `limit` bytes; negative if the state alone does not."""
        if any(one.total > limit for one in self.elsewhere):
            return -1.0
        room = limit - self.parameters - self.moments - self.gradients - self.buffers - self.timeline.fixed
        growing = self.timeline.per_utterance > 0.0
        if np.any(room[~growing] < 0.0):
            return -1.0
        return float(np.min(room[growing] / self.timeline.per_utterance[growing]))
