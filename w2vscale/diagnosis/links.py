"""What is measured between ranks in a process group: the shared folder, and the speed of all-reduce."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from w2vscale.diagnosis import needs
from w2vscale.diagnosis.disk import existing
from w2vscale.diagnosis.doctor import NCCL_LOG, NO_NETWORK
from w2vscale.diagnosis.finding import Finding, fail, listed, ok, warn
from w2vscale.distributed.launch import LostRanks
from w2vscale.distributed.process_group import LONG_TIMEOUT, Ranks, gather_from_ranks, process_group
from w2vscale.errors import UserError
from w2vscale.training.shared_folder import hosts_that_do_not_see

SAMPLE = 2**20  # bytes of the first all-reduce
LARGEST = 64 * 2**20  # bytes of those that a link gets which is not very slow
QUICK = 0.03  # seconds in which such a link sends the first one
ETHERNET = 0.1e9  # bytes per second; an Ethernet of 1 Gb/s has a little more
SLOW = {"cuda": 1e-3, "cpu": 10e-3}  # seconds for a few bytes: an update has some dozens of such messages
ADVICE = {
    ("cuda", False): "Look at `nvidia-smi topo -m`, and unset NCCL_P2P_DISABLE and NCCL_SHM_DISABLE. "
    f"{NCCL_LOG} how it connects the GPUs: P2P (NVLink or PCIe) is fast.",
    ("cuda", True): "Set NCCL_SOCKET_IFNAME (or LOCAL_ADDR for recipes) to the fastest interface, and unset "
    f"NCCL_IB_DISABLE. {NCCL_LOG} which network it uses: NET/IB is fast, NET/Socket is not. precision.reduce=bf16 and "
    "engine.shard_size=node send less.",
    ("cpu", False): "Other programs may use the cores: end them, or start fewer processes.",
    ("cpu", True): "Set GLOO_SOCKET_IFNAME (or LOCAL_ADDR for recipes) to the fastest interface.",
}


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


def network(hosts: list[str], exp: str | None) -> Iterator[Finding]:
    """Join the process group as training does, and measure in it. Collective; what is found is that of rank 0.

    `hosts`: that of each rank; `exp`: a folder that all hosts should share.
    """
    try:
        # The time-out is long because NCCL aborts a process when it has passed; `Children` stops this one earlier.
        with process_group(timeout=LONG_TIMEOUT) as (ranks, device):
            found = [_shared_folder(exp, ranks)] if len(set(hosts)) > 1 else []
            found += _links(ranks, device, hosts)
            yield from found if ranks.is_main else []
    except (UserError, RuntimeError) as error:
        yield failure(error)


def failure(error: Exception) -> Finding:
    """The finding about ranks that cannot communicate."""
    lines = [line for line in str(error).splitlines() if line.strip() not in ("", "Last error:")]
    # NCCL says the reason last. gloo begins with its source file.
    reason = re.sub(r"^\[.*?\] ", "", lines[-1])[:200] if lines else type(error).__name__
    if memory := [line for line in lines if "out of memory" in line]:
        found = f"a GPU has too little free memory: {memory[0][:200]}"
        return fail("network", found, "`nvidia-smi` lists the processes that use the GPUs: end them.")
    if isinstance(error, UserError) and not isinstance(error, LostRanks):
        return fail("network", str(error), "Start one process per GPU.")
    return fail("network", f"the ranks meet, but cannot communicate: {reason}", NO_NETWORK)


def _shared_folder(exp: str | None, ranks: Ranks) -> Finding:
    """Whether all hosts see the folder of the run. Collective."""
    if exp is None:
        return ok("shared folder", "not checked; name the run folder with --exp")
    folder, problem = existing(Path(exp)), ""
    path = folder / f".w2vscale-doctor-{os.environ.get('MASTER_PORT', '')}"
    content = os.urandom(16).hex().encode()
    try:
        if ranks.is_main:
            path.write_bytes(content)
    except OSError as error:
        problem = f"rank 0 cannot write to {folder}: {error.strerror}"
    try:
        first, blind = hosts_that_do_not_see(path, content, ranks)
    finally:
        if ranks.is_main:
            path.unlink(missing_ok=True)
    if blind and not problem:
        problem = f"{folder} on {first} (rank 0) is not the one on {listed(blind)}"
    if problem:
        return fail("shared folder", problem, "Choose an --exp on a disk that all hosts share.")
    return ok("shared folder", f"{folder} is the same on all hosts")


def _links(ranks: Ranks, device: torch.device, hosts: list[str]) -> list[Finding]:
    """How fast all-reduce is inside the hosts, and across them. Collective."""
    members = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in hosts}
    # Every rank makes every group.
    groups = {host: dist.new_group(inside) for host, inside in members.items() if len(inside) > 1}
    group = groups.get(hosts[ranks.rank])
    links = gather_from_ranks(all_reduce(group, device) if group is not None else None)
    found = []
    if inside := [link for link in links if link is not None]:
        slowest = min(inside, key=lambda link: link.bandwidth)
        found.append(link_finding(slowest, world_size=ranks.world_size, device=device.type, across=False))
    if len(members) > 1:
        link = all_reduce(None, device)
        found.append(link_finding(link, world_size=ranks.world_size, device=device.type, across=True))
    return found


def all_reduce(group: dist.ProcessGroup | None, device: torch.device) -> Link:
    """Measure all-reduce in a group; None: all ranks. Collective in the group."""
    latency = _seconds(8, 20, group, device)
    size, seconds = SAMPLE, _seconds(SAMPLE, 2, group, device)
    slowest: Any = torch.tensor(seconds, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    if slowest < QUICK:
        size, seconds = LARGEST, _seconds(LARGEST, 10, group, device)
    return Link(dist.get_world_size(group), size, seconds, latency)


def _seconds(size: int, count: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Median seconds of `count` all-reduces of `size` bytes, after one that is not counted."""
    tensor, times = torch.zeros(size // 4, device=device), []
    for _ in range(count + 1):
        start = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - start)
    return statistics.median(times[1:])


def link_finding(link: Link, *, world_size: int, device: str, across: bool) -> Finding:
    """Whether links are fast enough not to hold up training."""
    name, backend = "links across hosts" if across else "links in a host", "NCCL" if device == "cuda" else "gloo"
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(f"{backend.upper()}_")]
    found = (
        f"all-reduce: {link.bandwidth / 1e9:.2g} GB/s, {1000 * link.latency:.2g} ms between {link.ranks} ranks "
        f"({'; '.join([backend, *settings])})"
    )
    seconds, update = link.seconds * needs.GRADIENTS / link.size, needs.update_seconds(world_size)
    if device == "cuda" and seconds > update:
        found += (
            f": the gradients of `base` take {seconds:.2g} s, but {world_size} H100 compute an update in {update:.2g}"
        )
    elif device == "cpu" and link.bandwidth < ETHERNET:
        found += ": slower than an Ethernet of 1 Gb/s"
    elif link.latency > SLOW[device]:
        found += ": the latency is high"
    else:
        return ok(name, found)
    return warn(name, found, ADVICE[device, across])
