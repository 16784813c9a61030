"""Memory of a GPU: how much there is, and the most that a piece of work takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from w2vscale.config import BatchConfig
from w2vscale.errors import UserError


def memory_limit(device: torch.device) -> int:
    """Bytes of the GPU that this process may have, including what it has."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that the process has allocated on the GPU during `work`."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@contextmanager
def explain_oom(batch: BatchConfig) -> Iterator[None]:
    """Name the settings that the memory of a GPU depends on, where it is exhausted.

    Raises:
        UserError: it was.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).partition('. ')[0]}: lower batch.max_seconds ({batch.max_seconds:g}) or "
            f"batch.concat ({batch.concat}), or recompute activations (engine.activation_checkpointing)"
        ) from error
