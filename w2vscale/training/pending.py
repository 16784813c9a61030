"""Updates whose result is still on the device: the host reads it after it has enqueued the next update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.objectives import Sums


class Mark:
    """A point in the work of a device, reached once all work enqueued before it is done."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # blocking: a waiting host sleeps, so that the loader processes can use its core.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the device has reached this point."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_to(self, later: Mark) -> float:
        """Wait for both points and return the seconds between them, on the clock of the device."""
        self.wait()
        later.wait()
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        return self._event.elapsed_time(later._event) / 1000


class HostCopy:
    """A scalar on its way from the device to the host. `ready` is the point from which it can be read."""

    def __init__(self, scalar: Tensor) -> None:
        self._copy = scalar
        if scalar.device.type == "cuda":
            self._copy = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._copy.copy_(scalar, non_blocking=True)
        self.ready = Mark(scalar.device)

    def read(self) -> float:
        """Return the value. Waits for the work that computes it, but not for work enqueued later."""
        self.ready.wait()
        return float(self._copy)


@dataclass(frozen=True)
class PendingUpdate:
    """An update that has been enqueued on the device."""

    number: int  # from 1
    window: Sequence[MicroBatch]
    sums: Sums
    norm: HostCopy  # of the gradient before clipping; not finite if the update was skipped
    denominator: float
    data_seconds: float  # for which the device had nothing to do, because it waited for the window
