"""Where the ranks meet before they join a process group: a key-value store, so that a missing one can be named."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from w2vscale.diagnosis.finding import Finding, fail, listed, ok
from w2vscale.diagnosis.requirements import installed_version
from w2vscale.distributed.launch import number_in
from w2vscale.distributed.process_group import launch_environment
from w2vscale.errors import TemporaryError, UserError, counted
from w2vscale.version import __version__

Facts = dict[str, str]

LOOK = 0.1  # seconds between two looks for missing ranks


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
        self.set(f"rank/{self.rank}", json.dumps({"host": socket.gethostname(), **versions()}))

    def set(self, key: str, text: str) -> None:
        """Store a text for the other ranks."""
        self._store.set(key, text)

    def get(self, key: str, *, patience: float = 1.0) -> str:
        """A text that a rank stores, once it does. Raises TemporaryError after `patience` times the time-out."""
        try:
            self._store.wait([key], timedelta(seconds=patience * self._timeout))
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise TemporaryError(f"rank {self.rank} timed out waiting for {key} of another rank") from error

    def arrived(self) -> dict[int, Facts]:
        """The ranks that are here, once all are or the time-out has passed. "host" is the host of each."""
        deadline = time.monotonic() + self._timeout
        missing = set(range(self.world_size))
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if self._store.check([f"rank/{rank}"])}
            time.sleep(LOOK if missing else 0.0)
        here = sorted(set(range(self.world_size)) - missing)
        return {rank: json.loads(self.get(f"rank/{rank}")) for rank in here}

    def arrival(self, arrived: Mapping[int, Facts]) -> Finding:
        """Which ranks have come, and how many from each host."""
        counts = Counter(facts["host"] for facts in arrived.values())
        hosts = listed(f"{host} ({count})" for host, count in counts.items())
        missing = [rank for rank in range(self.world_size) if rank not in arrived]
        if not missing:
            return ok("ranks", f"{counted(self.world_size, 'rank')} on {counted(len(counts), 'host')}: {hosts}")
        found = (
            f"{counted(len(missing), 'rank')} ({listed(missing)}) did not connect to {self.address} within "
            f"{self._timeout:g} s; connected: {hosts}"
        )
        advice = "See whether they were started and what they print; the firewall must let them reach this address."
        return fail("ranks", found, advice)

    @staticmethod
    def same_versions(arrived: Mapping[int, Facts]) -> Finding:
        """Whether all ranks have the same versions and kind of device."""
        first, different = arrived[0], []
        names = [name for name in first if name != "host"]
        for name in names:
            if others := [rank for rank, facts in arrived.items() if facts[name] != first[name]]:
                other = arrived[others[0]][name]
                different.append(f"{name} {first[name]} on rank 0, {other} on rank {others[0]}")
        if different:
            advice = "Use the same environment on all hosts, and give all ranks a GPU or none."
            return fail("same software", f"the ranks differ: {'; '.join(different)}", advice)
        return ok("same software", ", ".join(f"{name} {first[name]}" for name in names))


def versions() -> Facts:
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
