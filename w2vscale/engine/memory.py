"""Memory of a device, as the process sees it: how much there is, and the most that a piece of work takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from w2vscale.config import Config
from w2vscale.errors import UserError

PROCESS = Path("/proc/self")
CONTROL_GROUP = Path("/sys/fs/cgroup")
FORGET_PEAK = "5"


def memory_limit(device: torch.device, *, processes: int) -> int:
    """Bytes that this process may have, where so many of a host's `processes` do the same.

    Raises:
        UserError: this system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    group = [_number(CONTROL_GROUP / f"memory.{name}") for name in ("max", "current")]
    if group[0] is not None and group[1] is not None:
        free = min(free, group[0] - group[1])
    return free // processes + _kilobytes(PROCESS / "status", "VmRSS")


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that the process had while it did `work`, all that it had before included.

    Raises:
        UserError: this system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what is free, but kept, would hide what the work needs
        libc.malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
    except OSError as error:
        raise _untold(error) from None
    work()
    return _kilobytes(PROCESS / "status", "VmHWM")


@contextmanager
def lack_of_memory_told(config: Config) -> Iterator[None]:
    """Names the settings that a GPU's memory depends on, where it does not suffice.

    Raises:
        UserError: it did not.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).partition('. ')[0]}: lower batch.max_seconds ({config.batch.max_seconds:g}) or "
            f"batch.concat ({config.batch.concat}), or recompute activations (engine.activation_checkpointing)"
        ) from error


def _kilobytes(path: Path, name: str) -> int:
    """A line `name: number kB` of a file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise _untold(error) from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _untold(error: OSError) -> UserError:
    return UserError(f"batch.concat=auto: this system does not tell how much memory is used ({error}); give a number")
