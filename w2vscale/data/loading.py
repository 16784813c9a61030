"""The DataLoader around micro-batches, and the processes that it starts."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Protocol
from weakref import WeakSet

import torch
from lhotse.cut import Cut
from torch.utils.data import DataLoader, Dataset

from w2vscale.config import DataConfig
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.errors import TemporaryError, UserError
from w2vscale.runtime import FULL_COLLECTIONS, STOP_SIGNALS, Interrupted, end_with_parent, socket_folder

DYING = 0.5  # seconds in which a process whose connections are closed has ended

_started: WeakSet[multiprocessing.process.BaseProcess] = WeakSet()
"""Loader processes that this process has started, while their loader is in use, without those that it has ended."""


class TrainingData(Protocol):
    """What a run trains on."""

    utterances: int  # per epoch
    utterances_in_all: int
    left_out: int  # utterances that no epoch has, because of their length
    not_found: int  # utterances that cannot be found in their shards
    micro_batches: int  # per epoch
    series_length: int  # number of consecutive micro-batches from the same duration bucket

    @property
    def hours(self) -> float:
        """Hours of audio per epoch."""

    def padding(self) -> float | None:
        """Return the fraction of the padded samples of an epoch that are padding; None if that is not known."""

    def describe(self) -> str:
        """Describe the data, to check that all ranks have the same."""

    def largest(self) -> MicroBatch:
        """Load a micro-batch with the most padded samples."""

    def sample(self, count: int) -> Iterator[Cut]:
        """Yield about `count` cuts that are spread over the data, without those that cannot be read."""

    def examples(self) -> Iterator[MicroBatch]:
        """Load a few micro-batches that include the one with the largest memory use."""

    def windows(self, updates: range, *, micro_batches: int, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches that this rank runs in each update, of `micro_batches` in all. Loads them ahead.

        `updates` are those of a run that has skipped no window. The call itself starts the loader processes.
        """


def gather_windows(loader: Iterable[MicroBatch], updates: range, *, per_rank: int) -> Iterator[list[MicroBatch]]:
    """Group the stream of micro-batches of a rank by update. Starts the loader processes at once.

    They must not start in the first `next`: a stop signal interrupts that, but must not interrupt a fork.
    """
    stream = iter(loader)
    return ([next(stream) for _ in range(per_rank)] for _ in updates)


class Loader(DataLoader[MicroBatch]):
    """Loads the micro-batches of `source` in `data.workers` processes, at least one window of `per_rank` ahead.

    `numbers` are those of the micro-batches, if `source` does not choose them itself. The processes end with the block
    of `loader_processes`.
    """

    def __init__(
        self, source: Dataset[MicroBatch], data: DataConfig, *, numbers: Iterable[int] | None = None, per_rank: int = 1
    ) -> None:
        each = max(data.prefetch, -(-per_rank // max(data.workers, 1)))
        super().__init__(
            source,
            sampler=numbers,
            batch_size=None,
            num_workers=data.workers,
            worker_init_fn=_prepare_loader_process,
            prefetch_factor=each if data.workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[MicroBatch]:  # type: ignore[override]
        before = set(multiprocessing.active_children())
        iterator = super().__iter__()
        _started.update(set(multiprocessing.active_children()) - before)
        return iterator


@contextmanager
def loader_processes() -> Iterator[None]:
    """End the loader processes that were started inside. There must be no such block around it.

    Raises TemporaryError if one was killed or died, whatever error that has caused: PyTorch notices it in a handler of
    a signal, so anywhere. Raises UserError if one raised it or found no space in /dev/shm.
    """
    with socket_folder():
        before = set(multiprocessing.active_children())
        _started.clear()
        try:
            yield
        except Exception as error:
            if (explained := _explained(error, set(_started))) is None:
                raise
            raise explained from error
        finally:
            _kill(set(multiprocessing.active_children()) - before)


def end_loader_processes() -> None:
    """End those that still run, such as when their micro-batches are not wanted any more."""
    _kill(set(_started))


def _explained(error: Exception, loaders: Iterable[multiprocessing.process.BaseProcess]) -> UserError | None:
    """The error to raise instead of one that a loader process has raised or caused, or None."""
    if isinstance(error, Interrupted):
        return None
    if isinstance(error, UserError):
        if "Original Traceback" not in str(error):
            return None
        # Raised in a loader process: its own message is the last line, after the name of its class.
        kind = TemporaryError if isinstance(error, TemporaryError) else UserError
        return kind(str(error).strip().splitlines()[-1].partition(": ")[2])
    with _deaths_ignored():
        running = [process for process in loaders if process.is_alive()]
        ended = multiprocessing.connection.wait([process.sentinel for process in running], DYING) if running else []
        for process in running:
            if process.sentinel in ended:
                process.join()
        code = next((process.exitcode for process in loaders if process.exitcode), None)
    if code is None and "DataLoader worker (pid" not in str(error):  # which a save passes on from another rank
        return None
    if code == -signal.SIGBUS:
        return UserError(
            "a loader process found no space in /dev/shm, which passes micro-batches on: enlarge it (docker: "
            "--shm-size), or lower data.prefetch or data.workers"
        )
    how = "of another rank" if code is None else signal.strsignal(-code) if code < 0 else f"exit code {code}"
    return TemporaryError(
        f"a loader process was killed or died ({how}), often for lack of memory: each of data.workers processes holds "
        "data.prefetch micro-batches; the same command continues the run"
    )


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """End processes that only read. PyTorch would wait for those that are blocked, which ignore SIGTERM."""
    with _deaths_ignored():
        for process in processes:
            process.kill()
            process.join()
            _started.discard(process)


@contextmanager
def _deaths_ignored() -> Iterator[None]:
    """Replace PyTorch's handler of SIGCHLD, which raises a RuntimeError for each loader process that has died.

    A thread cannot, and needs not: handlers run in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_death = signal.getsignal(signal.SIGCHLD)
    while signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL:
        with suppress(RuntimeError):  # of a death that came before
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, on_death)


def _prepare_loader_process(worker: int) -> None:
    """End with the trainer, and ignore the signals of a launcher: the trainer needs its loaders to finish the update.

    Also collect garbage automatically: the trainer may do it between steps, which a loader does not have.
    """
    end_with_parent()
    trainer = multiprocessing.parent_process()
    if trainer is not None and not trainer.is_alive():
        os._exit(1)
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTIONS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = partial(_unless_disconnected, sys.excepthook)


def _unless_disconnected(report: Callable[..., object], kind: type, error: Exception, trace: TracebackType) -> None:
    """Report an error, except a connection that the trainer has closed.

    A stop signal can end the trainer's wait while `multiprocessing.resource_sharer`, a thread of the loader, hands a
    tensor over. That thread reports its errors with `sys.excepthook`.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        report(kind, error, trace)
