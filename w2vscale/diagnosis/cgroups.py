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
    for folder in _folders(groups, root):
        cpus += _cpus(folder)
        for name, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            for limit in _numbers(folder / name):
                if limit < UNLIMITED:
                    memories.append((limit, max(sum(_numbers(folder / usage)) - _cached(folder / "memory.stat"), 0)))
        processes += _numbers(folder / "pids.max")
    memory, used = min(memories, key=lambda pair: pair[0] - pair[1], default=(None, 0))
    return Limits(min(cpus, default=None), memory, used, min(processes, default=None))


def _folders(groups: Path, root: Path) -> Iterator[Path]:
    """The folders of the groups of this process and those above them. In a container, the lower ones may be hidden."""
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        # In version 1, a folder for each controller or several, such as cpu,cpuacct.
        for top in (root, root / "unified", root / controllers, *(root / name for name in controllers.split(","))):
            place = top / path.strip("/")
            yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(top))


def _cpus(folder: Path) -> list[float]:
    """The limit in CPUs that a group sets, if it does."""
    old = zip(_lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us"), strict=False)
    new = (line.split() for line in _lines(folder / "cpu.max"))
    return [int(quota) / int(period) for quota, period in (*old, *new) if quota not in ("max", "-1")]


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _numbers(path: Path) -> list[int]:
    """The number in a file; none if there is no file, or it says "max"."""
    return [int(line) for line in _lines(path) if line != "max"]


def _cached(path: Path) -> int:
    """Bytes of files in the cache, which Linux frees on demand."""
    sizes = {name: int(size) for name, size in (line.split() for line in _lines(path))}
    # In version 1, those with total_ include the groups below; version 2 has no others.
    return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in ("inactive_file", "active_file"))
