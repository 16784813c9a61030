"""Calibration as on a GPU, on a CPU: forwards are real, the memory that they take is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from w2vscale.training import calibration
from w2vscale.training.run import Run

BASE = 1000
"""Bytes that are allocated before any forward."""

EACH = 100
"""Bytes that each micro-batch of a forward takes."""


@contextmanager
def made_up_memory(limit: int) -> Iterator[list[int]]:
    """A GPU with `limit` bytes; the list says how many micro-batches each forward of the calibration had."""
    forwards: list[int] = []
    take = calibration._take

    def taken(engine: Any, objective: Any, example: Any, copies: int, *, per_rank: int) -> None:
        forwards.append(copies)
        take(engine, objective, example, copies, per_rank=per_rank)

    def peak(device: torch.device, work: Callable[[], object]) -> int:
        before = len(forwards)
        work()
        return BASE + EACH * sum(forwards[before:])

    def conditions(run: Run) -> dict[str, Any]:
        return {"processes": run.ranks.world_size, "settings": run.config.model_dump(mode="json")}

    with (
        patch.object(calibration, "_take", taken),
        patch.object(calibration, "peak_memory", peak),
        patch.object(calibration, "memory_limit", lambda device: limit),
        patch.object(calibration, "_conditions", conditions),
    ):
        yield forwards


def per_forward_on_a_gpu(run: Run, limit: int = 10**9, log: Callable[[str], None] = lambda text: None) -> int:
    """The micro-batches per forward where the run has a GPU with `limit` bytes. Collective."""
    with made_up_memory(limit):
        return calibration.micro_batches_per_forward(replace(run, device=torch.device("cuda", 0)), log)
