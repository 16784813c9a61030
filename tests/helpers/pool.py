"""Processes that form a gloo group once and then run functions; nothing they do can hang a test."""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.processes import FORKS, fork_children


class Pool:
    """`size` ranks that live until `close`. They are forked from one process that has made the slow imports."""

    def __init__(self, size: int, folder: Path) -> None:
        self.folder = folder
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs, rank, size, folder), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """`function(*arguments)` on every rank; their results. A rank that fails or is late ends the pool."""
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + timeout
        results = []
        for rank, connection in enumerate(self.connections):
            try:
                arrived = connection.poll(max(deadline - time.monotonic(), 0.0))
                error, result = connection.recv() if arrived else (f"no answer in {timeout} s", None)
            except (EOFError, ConnectionError):
                error, result = self._death(rank), None
            if error is not None:
                self.close()
                raise AssertionError(f"rank {rank}: {error}")
            results.append(result)
        return results

    def _death(self, rank: int) -> str:
        """How the process of a rank has ended, with its stacks if it was a signal that it could handle."""
        self.processes[rank].join(10)
        return f"the process died ({self.processes[rank].exitcode})\n{_stacks(self.folder, rank).read_text()}"

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join(10)


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
