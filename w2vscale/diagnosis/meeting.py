"""Where the ranks meet before they join a process group: a key-value store, so that a missing one can be named."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.diagnosis.requirements import installed_version
from w2vscale.distributed.launch import local_processes, number_in
from w2vscale.distributed.nodes import Place, node_size
from w2vscale.distributed.process_group import launch_environment
from w2vscale.errors import TemporaryError, UserError, counted
from w2vscale.version import __version__

LOOK = 0.1  # seconds between two looks for missing ranks


@dataclass(frozen=True)
class Rank:
    """A rank that has arrived. `processes`: how many its launcher has started on its host, if it says so."""

    host: str
    local_rank: int
    processes: int | None
    versions: dict[str, str]


class Meeting:
    """The store of all ranks. `address`: where rank 0 serves it. Constructing it connects this rank.

    Raises UserError if rank 0 cannot serve, and TemporaryError if another rank does not reach it within `timeout`
    seconds.
    """

    def __init__(self, timeout: float) -> None:
        environment = os.environ | launch_environment(os.environ)
        if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
            raise UserError(f"RANK is set, but not {absent[0]}: a launcher sets both; set it, or unset RANK")
        self.rank, self.world_size = number_in(environment, "RANK", 0), number_in(environment, "WORLD_SIZE", 1)
        self.address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        self.local_rank = number_in(environment, "LOCAL_RANK", 0)
        self._timeout = timeout
        # The agent of torchrun may already serve a store there.
        serves = self.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = dist.TCPStore(
                environment["MASTER_ADDR"],
                number_in(environment, "MASTER_PORT", 0),
                is_master=serves,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,  # the process group uses it, too
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            if serves:
                raise UserError(
                    f"rank 0 cannot listen at {self.address} ({reason}): MASTER_ADDR must be an address of its host, "
                    "and MASTER_PORT a free port"
                ) from error
            raise TemporaryError(
                f"rank {self.rank} on {socket.gethostname()} does not reach rank 0 at {self.address} within "
                f"{timeout:g} s: is rank 0 running, MASTER_ADDR right, and the port open in the firewall?"
            ) from error
        # torchrun starts failed ranks again, and its store has the keys of their predecessors.
        self._store = dist.PrefixStore(f"doctor/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        own = Rank(socket.gethostname(), self.local_rank, local_processes(environment), versions())
        self.set(f"rank/{self.rank}", json.dumps(asdict(own)))

    def set(self, key: str, text: str) -> None:
        """Store a text for the other ranks."""
        self._store.set(key, text)

    def get(self, key: str, *, patience: float = 1.0) -> str:
        """A text that a rank stores, once it does. Raises TemporaryError after `patience` times the time-out."""
        try:
            self._store.wait([key], timedelta(seconds=patience * self._timeout))
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise TemporaryError(f"rank {self.rank} waits in vain for {key} of another rank") from error

    def arrived(self) -> dict[int, Rank]:
        """The ranks that are here, once all are or the time-out has passed."""
        deadline = time.monotonic() + self._timeout
        missing = set(range(self.world_size))
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if self._store.check([f"rank/{rank}"])}
            time.sleep(LOOK if missing else 0.0)
        here = sorted(set(range(self.world_size)) - missing)
        return {rank: Rank(**json.loads(self.get(f"rank/{rank}"))) for rank in here}


def versions() -> dict[str, str]:
    """What must be equal on all ranks."""
    return {
        "Python": platform.python_version(),
        "w2vscale": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "deepspeed": installed_version("deepspeed") or "none",
        "lhotse": installed_version("lhotse") or "none",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def hosts_of(arrived: Mapping[int, Rank]) -> dict[str, list[int]]:
    """The ranks of each host."""
    hosts: dict[str, list[int]] = {}
    for rank, facts in arrived.items():
        hosts.setdefault(facts.host, []).append(rank)
    return hosts


def spans(numbers: Iterable[int]) -> str:
    """Numbers in ascending order, with a dash for several in a row: 0–3, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)


def arrival_finding(arrived: Mapping[int, Rank], world_size: int, *, address: str, timeout: float) -> Finding:
    """Which ranks have come, and from which hosts."""
    hosts = hosts_of(arrived)
    listed = "; ".join(f"{host}: {spans(ranks)}" for host, ranks in hosts.items())
    missing = [rank for rank in range(world_size) if rank not in arrived]
    if not missing:
        return ok("ranks", f"{counted(world_size, 'rank')} on {counted(len(hosts), 'host')} ({listed})")
    number = f"rank {spans(missing)} has" if len(missing) == 1 else f"ranks {spans(missing)} have"
    return fail(
        "ranks",
        f"{number} not come to {address} within {timeout:g} s; here are {listed}",
        "See whether they were started and what they print; other hosts must reach this address through the firewall.",
    )


def versions_finding(arrived: Mapping[int, Rank]) -> Finding:
    """Whether all ranks have the same versions and kind of device."""
    different = []
    for name, first in arrived[0].versions.items():
        holders: dict[str, list[int]] = {first: []}
        for rank, facts in arrived.items():
            holders.setdefault(facts.versions.get(name, "none"), []).append(rank)
        if len(holders) > 1:
            shown = "; ".join(f"{value} on {spans(ranks)}" for value, ranks in holders.items())
            different.append(f"{name}: {shown}")
    if different:
        return fail(
            "same software",
            f"the ranks differ ({' | '.join(different)})",
            "Use the same environment on all hosts, and give all ranks a GPU or none.",
        )
    return ok("same software", ", ".join(f"{name} {value}" for name, value in arrived[0].versions.items()))


def order_finding(arrived: Mapping[int, Rank]) -> Finding:
    """Whether the ranks of a host are consecutive, as sharding within a host needs it."""
    places: Sequence[Place] = [Place(facts.host, facts.local_rank, facts.processes) for facts in arrived.values()]
    try:
        size = node_size(places, "engine.shard_size=node")
    except UserError as error:
        return warn("rank order", str(error), "Other settings work as they are.")
    return ok("rank order", f"{size} consecutive ranks on each host" if size > 1 else "one rank on each host")
