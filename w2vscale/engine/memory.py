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
CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
FORGET_PEAK = "5"


def memory_limit(device: torch.device, *, processes: int) -> int:
    """Bytes that this process may have, where so many of a host's `processes` do the same.

    Raises:
        UserError: this system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = min([_kilobytes(MEMORY, "MemAvailable"), *(limit - used for limit, used in _control_groups())])
    return free // processes + _kilobytes(PROCESS / "status", "VmRSS")


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, or the host may use.

    Raises:
        UserError: this system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([_kilobytes(MEMORY, "MemTotal"), *(limit for limit, _ in _control_groups())])


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


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit and use of memory, without the files that the system may forget, of each control group that the process is
    in: its own, and those around it (cgroups(7), of versions 1 and 2)."""
    try:
        lines = (PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = CONTROL_GROUPS / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None:
                yield limit, used - _statistic(group / "memory.stat", names[2])


def _statistic(path: Path, name: str) -> int:
    """A line `name number` of a file; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _kilobytes(path: Path, name: str) -> int:
    """A line `name: number kB` of a file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise _untold(error) from None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise _untold(f"{path} has no {name}")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _untold(error: OSError | str) -> UserError:
    return UserError(f"batch.concat=auto: this system does not tell how much memory is used ({error}); give a number")
