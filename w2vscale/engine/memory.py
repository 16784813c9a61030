"""GPU memory: the limit, the peak during some work, and a clear error when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from w2vscale.config import BatchConfig
from w2vscale.errors import UserError


def memory_limit(device: torch.device) -> int:
    """Return the bytes of GPU memory available to this process, including what it has reserved."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Run `work` and return the peak bytes that this process had allocated on the GPU meanwhile."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@contextmanager
def explain_oom(batch: BatchConfig) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU in the block into a UserError that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        concat = "set batch.concat to a number" if batch.concat == "auto" else f"lower batch.concat ({batch.concat})"
        raise UserError(
            f"{str(error).partition('. ')[0]}: lower batch.max_seconds ({batch.max_seconds:g}), {concat}, or recompute "
            "activations (engine.activation_checkpointing)"
        ) from error
