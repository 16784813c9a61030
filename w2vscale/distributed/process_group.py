"""Joining the process group, and the collectives that training uses."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from w2vscale.distributed.launch import LostRanks, number_in, ranked, slurm_tasks
from w2vscale.distributed.ranks import ALONE, ON_ALL_RANKS, Ranks
from w2vscale.errors import UserError

TIMEOUT = timedelta(minutes=10)  # longest time that a rank waits for the others in a collective
LONG_TIMEOUT = timedelta(days=1)  # the same for commands in which a single utterance may take hours
LOOK = 1.0  # seconds between looks at the work of `Patience`

T = TypeVar("T")


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Derive RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the variables that SLURM sets.

    Empty if torchrun has set them already, or if SLURM did not start this process as one of several tasks.
    """
    if ranked(environment) or slurm_tasks(environment) <= 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
    }


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a SLURM step agree on, and that differs between jobs and steps on one node."""
    job, step = number_in(environment, "SLURM_JOB_ID", 0), number_in(environment, "SLURM_STEP_ID", 0)
    # Linux gives ports from 32768 on to outgoing connections. Job numbers are consecutive, so steps are far apart.
    return 20_000 + (job + 1_009 * step) % 12_000


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    if not any(character in nodes for character in "[,"):
        return nodes
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot expand the SLURM node list {nodes} ({error}); set MASTER_ADDR to one node") from None
    return hosts.stdout.split()[0]


@contextmanager
def process_group(*, needed: bool = False, timeout: timedelta = TIMEOUT) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group that the launcher describes, and leave it when the block ends.

    A single process joins no group, unless `needed`: then it gets a group with one rank. A collective fails if a rank
    waits longer than `timeout` for the others, and the start if it cannot find them within that time or ten minutes.
    Raises LostRanks if the other ranks cannot be reached or the connection to them breaks, and UserError if this
    process sees no GPU for its local rank, or several ranks have the same GPU.
    """
    implied = launch_environment(os.environ)
    environment = {**os.environ, **implied}
    if "RANK" not in environment or number_in(environment, "WORLD_SIZE", 1) == 1:
        device, backend = _device(0)
        if needed:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield ALONE, device
        finally:
            if needed:
                dist.destroy_process_group()
        return
    rank, world_size = number_in(environment, "RANK", 0), number_in(environment, "WORLD_SIZE", 1)
    ranks = Ranks(rank, number_in(environment, "LOCAL_RANK", 0), world_size)
    # The torchrun agent may already serve the store; only env:// uses it.
    init_method = f"tcp://{implied['MASTER_ADDR']}:{implied['MASTER_PORT']}" if implied else "env://"
    device, backend = _device(ranks.local_rank)
    try:
        # The ranks find each other within TIMEOUT, however long `timeout` is.
        store, _, _ = next(dist.rendezvous(init_method, rank, world_size, timeout=min(timeout, TIMEOUT)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        if device.type == "cuda":
            refuse_shared_gpus(socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
        yield ranks, device
    except RuntimeError as error:
        # gloo raises a plain RuntimeError whose message contains the path of its source file.
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            raise LostRanks(str(error)) from error
        raise
    # Skipped after an error, because it could wait for ranks that have exited.
    dist.destroy_process_group()


def side_store(timeout: timedelta) -> dist.TCPStore:
    """Connect all ranks to a key-value store in rank 0, apart from the process group. Collective.

    Its operations raise RuntimeError after `timeout`.
    """
    host = (os.environ | launch_environment(os.environ)).get("MASTER_ADDR", "localhost")
    server = None
    if dist.get_rank() == 0:
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    port = broadcast_from_main(server.port if server is not None else None)
    return server or dist.TCPStore(host, port, is_master=False, timeout=timeout)


def _device(local_rank: int) -> tuple[torch.device, str]:
    """Return the device of a rank, and the backend for its collectives."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    index = gpu_index(local_rank, torch.cuda.device_count())
    # DeviceMesh keeps a device that was set before, and would otherwise set the one of LOCAL_RANK.
    torch.cuda.set_device(index)
    return torch.device("cuda", index), "cpu:gloo,cuda:nccl"


def gpu_index(local_rank: int, visible: int) -> int:
    """Return the index of the GPU that a process uses, of the `visible` ones it sees.

    It is the local rank, or 0 if the process sees only one: a launcher may give each process a GPU of its own (srun
    --gpus-per-task=1). Raises UserError if there is none for the local rank.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank}: this process sees {visible} GPUs; start fewer processes per machine")
    return local_rank


def refuse_shared_gpus(host: str, uuid: str) -> None:
    """Raise a UserError on every rank if several ranks have the same GPU, which NCCL does not allow. Collective.

    `host` and `uuid` are those of the GPU of this rank.
    """
    gpus = gather_from_ranks((host, uuid))
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            ranks = ", ".join(str(rank) for rank, other in enumerate(gpus) if other == gpu)
            raise UserError(f"ranks {ranks} would share one GPU of {gpu[0]} ({gpu[1]}): start one process per GPU")


def sum_over_ranks(values: Sequence[float], operation: Any = dist.ReduceOp.SUM) -> list[float]:
    """Sum each number over all ranks, in float64 on the CPU, without synchronising a GPU. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return [float(value) for value in tensor]


def largest_over_ranks(values: Sequence[float]) -> list[float]:
    """Like `sum_over_ranks`, but return the maximum of each number. Collective."""
    return sum_over_ranks(values, dist.ReduceOp.MAX)


def gather_from_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, in rank order. Collective in `group` (default: all ranks)."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """If the block raises a UserError on any rank, raise it on every rank: that of the lowest such rank. Collective."""
    error: UserError | None = None
    try:
        yield
    except UserError as own:
        error = type(own)(str(own))  # without its traceback, which cannot be sent
    for found in gather_from_ranks(error):
        if found is not None:
            found.add_note(ON_ALL_RANKS)
            raise found


class Patience:
    """Runs work that may take long, such as a download, so that ranks that wait for it are not taken to hang.

    While `progress` is called on any rank, `note` is called on all of them, about once in LOOK seconds.
    """

    def __init__(self, note: Callable[[], None] = lambda: None) -> None:
        self.note, self._steps = note, 0

    def progress(self) -> None:
        """Note progress of the work. Not collective; any thread may call it."""
        self._steps += 1

    def run(self, work: Callable[[], T]) -> T:
        """Run the work of this rank in a thread, and wait for that of all ranks. Errors as in `errors_on_all_ranks`.

        Collective, but the work is not.
        """
        seen, busy = self._steps, True
        with ThreadPoolExecutor(1, thread_name_prefix="patience") as pool:
            future = pool.submit(work)
            while busy:
                wait([future], LOOK)
                steps = self._steps
                unfinished, moved = largest_over_ranks([not future.done(), steps != seen])
                seen, busy = steps, bool(unfinished)
                if moved or not busy:
                    self.note()
        with errors_on_all_ranks():
            result = future.result()
        return result


def gather_as_found(stream: Iterable[T], *, every_seconds: float = 20.0) -> Iterator[T]:
    """Yield the items of all ranks' streams on every rank, exchanged about every `every_seconds`. Collective.

    An item that takes longer than the timeout of the process group makes the other ranks fail.
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
    """Return the value of rank 0 on every rank. Collective."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]
