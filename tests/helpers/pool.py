"""Processes that form a gloo group once and then run functions; nothing they do can hang a test."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.processes import FORKS, fork_children

CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
"""Exit codes of a process whose memory is corrupt. With PyTorch 2.13, gloo's threads do that once in some hundred runs
of DeepSpeed on a CPU: `malloc(): unaligned tcache chunk detected` in `gloo::allgather`."""


class Pool:
    """`size` ranks that live until `close`. They are forked from one process that has made the slow imports."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self._start()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """`function(*arguments)` on every rank; their results. A rank that fails or is late ends the pool.

        If a rank crashes, a warning says where it was, and new ranks run the function a second time.
        """
        try:
            return self._run(function, arguments, timeout)
        except Crash as crash:
            warnings.warn(f"{function.__name__} runs a second time: {crash}", stacklevel=2)
            (self.folder / "store").unlink()
            self._start()
            return self._run(function, arguments, timeout)

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join(10)

    def _start(self) -> None:
        self.connections, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs, rank, self.size, self.folder), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + timeout
        results = []
        for rank, connection in enumerate(self.connections):
            try:
                arrived = connection.poll(max(deadline - time.monotonic(), 0.0))
                error, result = connection.recv() if arrived else (f"no answer in {timeout} s", None)
            except (EOFError, ConnectionError):
                error, result = "the process died", None
            if error is not None:
                time.sleep(0.5)  # a rank that has crashed makes others fail
                codes = [process.exitcode for process in self.processes]
                self.close()
                stacks = [_stacks(self.folder, rank).read_text() for rank in range(self.size)]
                if any(code in CRASHES for code in codes):
                    raise Crash("\n".join([f"exit codes {codes}", *stacks]))
                raise AssertionError(f"rank {rank}: {error}; exit codes {codes}")
            results.append(result)
        return results


class Crash(AssertionError):
    """A rank has died of a signal that says that its memory is corrupt."""


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks_rank_{rank}.txt"


def _serve(connection: Connection, rank: int, size: int, folder: Path) -> None:
    fork_children()
    faulthandler.enable(_stacks(folder, rank).open("w"))
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, function(*arguments)))
        except BaseException:
            connection.send((traceback.format_exc(), None))
