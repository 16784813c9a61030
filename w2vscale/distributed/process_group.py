"""Ranks: who this process is, and the collectives that the training loop uses."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from w2vscale.distributed.launch import LostRanks
from w2vscale.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other."""

LONG_TIMEOUT = timedelta(days=1)
"""The same where one of them may have an utterance of hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs and commits checkpoints."""
        return self.rank == 0


ALONE = Ranks()


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them, or as SLURM implies them.

    Empty for a process that nobody launched.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    # Set by srun alone: a batch script has SLURM_NTASKS and SLURM_PROCID too, but is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) <= 1 or "SLURM_PROCID" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        # Jobs that share a node must not share a port.
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000),
    }


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    if not any(character in nodes for character in "[,"):
        return nodes
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"SLURM's nodes {nodes}: cannot be listed ({error}); set MASTER_ADDR to one of them") from None
    return hosts.stdout.split()[0]


@contextmanager
def process_group(*, needed: bool = False, timeout: timedelta = TIMEOUT) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group that the launcher describes, for the time of the block.

    A process that is alone has no group, or a group of its own where one is `needed`. A collective in which a rank
    waits longer than `timeout` for another fails.

    Raises:
        LostRanks: the other ranks cannot be reached, or no longer.
    """
    implied = launch_environment(os.environ)
    environment = {**os.environ, **implied}
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        device = _device(0)
        if needed:
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield Ranks(), device
        finally:
            if needed:
                dist.destroy_process_group()
        return
    ranks = Ranks(
        rank=int(environment["RANK"]),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        world_size=int(environment["WORLD_SIZE"]),
    )
    # Under torchrun the agent may already serve the store, which only env:// knows.
    meeting = f"tcp://{implied['MASTER_ADDR']}:{implied['MASTER_PORT']}" if implied else "env://"
    device = _device(ranks.local_rank)
    try:
        dist.init_process_group(
            _backend(device), meeting, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
        yield ranks, device
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name the place in its source.
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            raise LostRanks(str(error)) from error
        raise
    # Not after an error: it may wait for ranks that no longer come.
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} GPUs; start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums of host numbers over all ranks, in float64 over the CPU: no device is waited for."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def largest_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each of some host numbers over all ranks, over the CPU."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def gather_from_ranks(value: T) -> list[T]:
    """Every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_anywhere(error: str | None) -> None:
    """Collective. Raise the error of the lowest rank that has one, on every rank.

    Raises:
        UserError: any rank has an error.
    """
    for found in gather_from_ranks(error):
        if found is not None:
            raise UserError(found)


def gather_as_found(stream: Iterable[T], *, every_seconds: float = 20.0) -> Iterator[T]:
    """What the streams of all ranks yield, on every rank and soon after it was found. Collective.

    No rank may wait longer for another's next item than the time-out of the process group.
    """
    if not dist.is_initialized():
        yield from stream
        return
    own = iter(stream)
    while True:
        found, ended, until = [], False, time.monotonic() + every_seconds
        while not ended and time.monotonic() < until:
            try:
                found.append(next(own))
            except StopIteration:
                ended = True
        parts = gather_from_ranks((found, ended))
        for part, _ in parts:
            yield from part
        if all(ended for _, ended in parts):
            return


def broadcast_from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]
