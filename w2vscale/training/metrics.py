"""Training metrics, accumulated between log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import gather_from_ranks, largest_over_ranks, sum_over_ranks
from w2vscale.evaluation.validation import reduce_sums
from w2vscale.hardware import memory_used
from w2vscale.objectives import Sums, add_sums


class Meter:
    """Accumulates sums, counts and times of this rank since the last `read`."""

    def __init__(self, sampling_rate: int, device: torch.device) -> None:
        self.sampling_rate = sampling_rate
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.sums: Any = None
        self.audio = self.padded = self.frames = self.masked = self.updates = 0
        self.norms: list[float] = []
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, window: Sequence[MicroBatch], sums: Sums, norm: float, *, data_seconds: float) -> None:
        """Add one update with this gradient norm, which waited `data_seconds` for its window."""
        if skipped := not math.isfinite(norm):  # its non-finite values would spoil the sums of the other updates
            zero: Any = type(sums)
            sums = zero(*(torch.zeros_like(field) for field in sums))
        self.sums = sums if self.sums is None else add_sums(self.sums, sums)
        self.audio += sum(batch.audio_samples for batch in window)
        self.padded += sum(batch.padded_samples for batch in window)
        self.updates += 1
        if not skipped:
            self.frames += sum(batch.frames for batch in window)
            self.masked += sum(batch.masked_frames for batch in window)
            self.norms.append(norm)
        self.data_seconds += data_seconds

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent on updates from the rates."""
        self.started += seconds

    def read(self, metrics: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """Return the metrics over all ranks since the last `read`, and reset. Collective."""
        assert self.sums is not None
        elapsed = time.perf_counter() - self.started
        values = metrics(reduce_sums(self.sums))
        audio, padded, frames, masked = sum_over_ranks([self.audio, self.padded, self.frames, self.masked])
        values |= {
            "masked_fraction": masked / max(frames, 1.0),
            "padding": 1.0 - audio / max(padded, 1.0),
            "grad_norm": sum(self.norms) / len(self.norms) if self.norms else math.nan,
            "grad_norm_max": max(self.norms, default=math.nan),
            "audio_seconds_per_second": audio / self.sampling_rate / elapsed,
            "updates_per_second": self.updates / elapsed,
            # The slowest rank counts, because all others wait for it.
            "data_wait_fraction": max(gather_from_ranks(self.data_seconds)) / elapsed,
        }
        values["peak_memory_gib"] = largest_over_ranks([memory_used(self.device)])[0] / 2**30
        self._reset()
        return values
