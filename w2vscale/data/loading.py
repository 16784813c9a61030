"""The DataLoader around micro-batches, and the processes that it starts."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.process
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from w2vscale.config import DataConfig
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.errors import UserError
from w2vscale.runtime import FULL_COLLECTIONS, STOP_SIGNALS


class TrainingData(Protocol):
    """What a run trains on."""

    @property
    def utterances(self) -> int | None:
        """In one epoch; None if that is not known."""

    @property
    def micro_batches(self) -> int | None:
        """In one epoch; None if that is not known."""

    def describe(self) -> str:
        """What all ranks must agree on."""

    def largest(self) -> MicroBatch:
        """One that needs as much memory as any."""

    def examples(self) -> Iterator[MicroBatch]:
        """Micro-batches of decreasing length, each as large as any of its length."""

    def windows(self, updates: range, *, micro_batches: int, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """For each update the micro-batches of its `micro_batches` that this rank runs, loaded ahead."""


def gather_windows(loader: Iterable[MicroBatch], updates: range, *, per_rank: int) -> Iterator[list[MicroBatch]]:
    """The stream of micro-batches of a rank, update by update."""
    stream = iter(loader)
    for _ in updates:
        yield [next(stream) for _ in range(per_rank)]


def loader_settings(data: DataConfig, *, per_rank: int = 1) -> dict[str, Any]:
    """Arguments of a DataLoader for any dataset. A whole window of `per_rank` micro-batches is loaded ahead."""
    return {
        "batch_size": None,
        "num_workers": data.workers,
        "worker_init_fn": _prepare_loader_process,
        "prefetch_factor": max(data.prefetch, -(-per_rank // data.workers)) if data.workers else None,
        "pin_memory": torch.cuda.is_available(),
    }


@contextmanager
def loader_processes() -> Iterator[None]:
    """End the loader processes that were started inside, and report errors of PyTorch about them in one line.

    Raises:
        UserError: a process died, or failed for a reason outside the program.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except RuntimeError as error:
        dead = re.search(r"worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?", str(error))
        if dead is None:
            raise
        if "Bus error" in str(error):
            raise UserError(
                f"a loader process (pid {dead[1]}) found no space in /dev/shm, which passes micro-batches on: "
                "enlarge it (docker: --shm-size), or lower data.prefetch or data.workers"
            ) from error
        how = f"was killed ({dead[2].strip()})" if dead[2] else "died"
        raise UserError(
            f"a loader process (pid {dead[1]}) {how}, often for lack of memory: each of data.workers processes holds "
            "data.prefetch micro-batches; the same command continues from the newest checkpoint"
        ) from error
    except UserError as error:
        if "Original Traceback" not in str(error):
            raise
        # Raised in a loader process: its own message is the last line.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2]) from error
    finally:
        _kill(set(multiprocessing.active_children()) - before)


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """End processes that only read. PyTorch would wait for those that are blocked, which ignore SIGTERM."""
    on_death = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of PyTorch raises an error for each
    for process in processes:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, on_death)


def _prepare_loader_process(worker: int) -> None:
    """A launcher signals the whole process group, but the trainer still needs its loaders to finish the update. The
    trainer may also collect garbage at moments of its own choice, which a loader does not have."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTIONS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
