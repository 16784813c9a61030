"""What the container or job of this process may use: the limits of its control groups, in version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 2**60  # bytes; version 1 writes a number near 2^63 where there is no limit


@dataclass(frozen=True)
class Limits:
    """Numbers of CPUs, bytes and processes; None where there is no limit. `memory_used`: without files in the cache."""

    cpus: float | None = None
    memory: int | None = None
    memory_used: int = 0
    processes: int | None = None


def limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The tightest limits of the groups of this process and all groups above them."""
    cpus: list[float] = []
    memories: list[tuple[int, int]] = []  # limit, and what is used
    processes: list[int] = []
    for folder in _folders(groups, root, "cpu"):
        cpus += _cpus(folder)
    for folder in _folders(groups, root, "memory"):
        for name, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (limit := _number(folder / name)) is not None and limit < UNLIMITED:
                memories.append((limit, max((_number(folder / usage) or 0) - _cached(folder / "memory.stat"), 0)))
    for folder in _folders(groups, root, "pids"):
        if (limit := _number(folder / "pids.max")) is not None:
            processes.append(limit)
    least = min(memories, key=lambda pair: pair[0] - pair[1], default=None)
    memory, used = least if least is not None else (None, 0)
    return Limits(min(cpus, default=None), memory, used, min(processes, default=None))


def _folders(groups: Path, root: Path, controller: str) -> Iterator[Path]:
    """The folders of the group of this process and those above it. In a container, the lower ones may be hidden."""
    lines: list[str] = []
    with suppress(OSError):
        lines = groups.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top = root / "unified" if (root / "unified").is_dir() else root
        elif controller in controllers.split(","):
            top = next((root / name for name in (controllers, controller) if (root / name).is_dir()), root / controller)
        else:
            continue
        place = top / path.strip("/")
        yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(top))


def _cpus(folder: Path) -> list[float]:
    """The limit in CPUs that a group sets, if it does."""
    quota = period = None
    with suppress(OSError, ValueError):  # "max 100000" has no quota
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    if quota is None:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return [quota / period] if quota and period and quota > 0 else []


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max"
        return int(path.read_text())
    return None


def _cached(path: Path) -> int:
    """Bytes of files in the cache, which Linux frees on demand."""
    pairs: list[list[str]] = []
    with suppress(OSError):
        pairs = [line.split() for line in path.read_text().splitlines()]
    sizes = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    # In version 1, those with total_ include the groups below; version 2 has no others.
    return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in ("inactive_file", "active_file"))
