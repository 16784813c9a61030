"""What is measured between ranks in a process group: clocks, the shared folder, and the speed of all-reduce."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from w2vscale.diagnosis import needs
from w2vscale.diagnosis.disk import existing
from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.distributed.process_group import Ranks, gather_from_ranks, sum_over_ranks
from w2vscale.training.shared_folder import hosts_that_do_not_see

SAMPLE = 2**20  # bytes of the first all-reduce, which decides how large the next one is
LARGEST = 64 * 2**20  # bytes
SECONDS = 2.0  # for a measurement, about
APART = 2.0  # seconds between two clocks
ETHERNET = 0.1e9  # bytes per second; an Ethernet of 1 Gb/s has a little more
SLOW = {"cuda": 1e-3, "cpu": 10e-3}  # seconds for a few bytes: an update has some dozens of such messages


@dataclass(frozen=True)
class Link:
    """All-reduce over `ranks` ranks: seconds for `size` bytes, and for a few bytes."""

    ranks: int
    size: int
    seconds: float
    latency: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second that each rank sends in a ring, which sends 2 (n - 1) / n times the size."""
        return 2 * (self.ranks - 1) / self.ranks * self.size / self.seconds


def measure(
    ranks: Ranks, device: torch.device, hosts: Mapping[str, Sequence[int]], exp: Path | None
) -> Iterator[Finding]:
    """All measurements. Collective. `exp`: a folder that all hosts should share."""
    if len(hosts) > 1:
        yield clock_finding(_clocks())
        yield from _shared_folder(exp, ranks, len(hosts))
    # Every rank makes every group.
    groups = [dist.new_group(list(members)) for members in hosts.values() if len(members) > 1]
    inside = [members for members in hosts.values() if len(members) > 1]
    own = next((group for group, members in zip(groups, inside, strict=True) if ranks.rank in members), None)
    link = all_reduce(own, device) if own is not None else None
    links = [found for found in gather_from_ranks(link) if found is not None]
    if links:
        slowest = min(links, key=lambda found: found.bandwidth)
        yield link_finding(slowest, world_size=ranks.world_size, device=device.type, across=False)
    if len(hosts) > 1:
        across = all_reduce(None, device)
        yield link_finding(across, world_size=ranks.world_size, device=device.type, across=True)


def _clocks() -> list[float]:
    """The times of all ranks, read at about the same moment. Collective."""
    sum_over_ranks([0.0])
    return gather_from_ranks(time.time())


def clock_finding(times: Sequence[float]) -> Finding:
    """Whether the clocks of all hosts agree."""
    apart = max(times) - min(times)
    if apart > APART:
        late = max(range(len(times)), key=lambda rank: abs(times[rank] - statistics.median(times)))
        return warn(
            "clocks",
            f"{apart:.1f} s apart; that of rank {late} differs most",
            "Synchronise them (NTP): logs mislead otherwise, and object stores refuse wrong times.",
        )
    return ok("clocks", f"less than {max(apart, 0.1):.1f} s apart")


def _shared_folder(exp: Path | None, ranks: Ranks, hosts: int) -> Iterator[Finding]:
    """Whether all hosts see the folder of the run. Collective."""
    if exp is None:
        yield ok("shared folder", "not checked; name the run folder with --exp")
        return
    folder = existing(exp)
    path = folder / f".w2vscale-doctor-{os.environ.get('MASTER_PORT', '')}"
    content = os.urandom(16).hex().encode()
    problem = ""
    if ranks.is_main:
        try:
            path.write_bytes(content)
        except OSError as error:
            problem = str(error.strerror)
    try:
        first, blind = hosts_that_do_not_see(path, content, ranks)
    finally:
        if ranks.is_main:
            with suppress(OSError):
                path.unlink()
    if problem:
        yield fail("shared folder", f"rank 0 cannot write to {folder}: {problem}", "Choose another --exp.")
    elif blind:
        yield fail(
            "shared folder",
            f"{folder} on {first} (rank 0) is not the one on {', '.join(blind)}",
            "Choose an --exp on a disk that all hosts share.",
        )
    else:
        yield ok("shared folder", f"{folder} is the same on {hosts} hosts")


def all_reduce(group: dist.ProcessGroup | None, device: torch.device) -> Link:
    """Measure all-reduce in a group; None: all ranks. Collective in the group."""
    members = dist.get_world_size(group)
    latency = statistics.median(_times(8, 20, group, device))
    # A slow link gets less, so that the measurement ends within its time.
    seconds = _slowest(min(_times(SAMPLE, 2, group, device)), group, device)
    size = int(min(LARGEST, max(SAMPLE, SAMPLE * SECONDS / 4 / seconds)))
    count = int(min(10, max(2, SECONDS / 2 / (seconds * size / SAMPLE))))
    return Link(members, size, statistics.median(_times(size, count, group, device)), latency)


def _times(size: int, count: int, group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Seconds of each all-reduce of `size` bytes, after one that is not counted."""
    tensor, times = torch.zeros(size // 4, device=device), []
    for _ in range(count + 1):
        start = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - start)
    return times[1:]


def _slowest(seconds: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """The largest value of all ranks, so that all measure as often."""
    maximum: Any = dist.ReduceOp.MAX
    tensor = torch.tensor([seconds], device=device)
    dist.all_reduce(tensor, maximum, group=group)
    return float(tensor)


def link_finding(link: Link, *, world_size: int, device: str, across: bool) -> Finding:
    """Whether links are fast enough not to hold up training."""
    name = "links across hosts" if across else "links in a host"
    backend = "NCCL" if device == "cuda" else "gloo"
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(f"{backend.upper()}_")]
    found = (
        f"all-reduce: {link.bandwidth / 1e9:.2g} GB/s, {1000 * link.latency:.2g} ms between {link.ranks} ranks "
        f"({'; '.join([backend, *settings])})"
    )
    if problem := _slow(link, world_size=world_size, device=device):
        return warn(name, f"{found}: {problem}", ADVICE[device, across])
    return ok(name, found)


def _slow(link: Link, *, world_size: int, device: str) -> str:
    """What is slow about a link, or ""."""
    if device == "cuda":
        seconds, update = link.seconds * needs.GRADIENTS / link.size, needs.update_seconds(world_size)
        if seconds > update:
            return (
                f"the gradients of `base` take {seconds:.2g} s, but {world_size} H100 compute an update in {update:.2g}"
            )
    elif link.bandwidth < ETHERNET:
        return "slower than an Ethernet of 1 Gb/s"
    return "even small messages take long" if link.latency > SLOW[device] else ""


ADVICE = {
    ("cuda", False): "Look at `nvidia-smi topo -m`. NCCL_DEBUG=INFO shows how NCCL connects the GPUs: P2P (NVLink or "
    "PCIe) is fast; unset NCCL_P2P_DISABLE and NCCL_SHM_DISABLE, and enlarge /dev/shm.",
    ("cuda", True): "NCCL_DEBUG=INFO shows the network that NCCL uses: NET/IB is fast, NET/Socket is not. Set "
    "NCCL_SOCKET_IFNAME (or LOCAL_ADDR for recipes) to the fastest interface, and unset NCCL_IB_DISABLE. "
    "precision.reduce=bf16 and engine.shard_size=node send less.",
    ("cpu", False): "Other programs may use the cores: end them, or start fewer processes.",
    ("cpu", True): "Set GLOO_SOCKET_IFNAME (or LOCAL_ADDR for recipes) to the fastest interface.",
}
