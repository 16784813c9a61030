"""Processes that form a gloo group once and then run functions; nothing they do can hang a test."""

from __future__ import annotations

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
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs, rank, size, str(folder / "store")), daemon=True)
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
            except EOFError:
                error, result = "the process died", None
            if error is not None:
                self.close()
                raise AssertionError(f"rank {rank}: {error}")
            results.append(result)
        return results

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join(10)


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    fork_children()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((None, function(*arguments)))
        except BaseException:
            connection.send((traceback.format_exc(), None))
