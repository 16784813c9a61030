"""Apply a function to many chunks of work in forked processes, in order, with few chunks in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from w2vscale.errors import UserError
from w2vscale.storage.urls import Url

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_function: Callable[[Any], Any]


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count` parts of a piece of work, such as the tasks of an array job do."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Part:
        """Return the part that `K/N` names. Raises UserError if it is something else."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--part {text}: give K/N, from 1/N to N/N")
        return Part(int(number), int(count))

    def range(self, total: int) -> range:
        """Return the numbers of this part, of 0 … `total` - 1. Parts are consecutive, and differ by at most one."""
        return range((self.number - 1) * total // self.count, self.number * total // self.count)


WHOLE = Part()


class WorkerDied(UserError):
    """A worker process ended without a result."""


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


def chunked(items: Sequence[Chunk], size: int) -> Iterator[Sequence[Chunk]]:
    """Cut `items` into chunks of `size`; the last one may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))


def parallel_map(
    function: Callable[[Chunk], Result],
    chunks: Iterable[Chunk],
    *,
    jobs: int,
    source: Path | Url,
    isolate: bool = False,
) -> Iterator[Result]:
    """Apply `function` to each chunk with `jobs` processes; yields the results in order.

    At most 2 × `jobs` chunks are in progress. Chunks and results are pickled; `function` is not, because the processes
    are forked. A single job runs in this process, unless `isolate` protects it from crashes of `function`. No worker
    outlives its parent. Raises WorkerDied, naming `source`, if a worker was killed or crashed.
    """
    if jobs == 1 and not isolate:
        yield from map(function, chunks)
        return
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(function,)
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for chunk in chunks:
            if len(waiting) == 2 * jobs:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_call, chunk))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkerDied(
            f"{source}: a worker process died: it was killed, perhaps for lack of memory (use fewer --jobs), or crashed"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # shells ignore it for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; only the parent prints a traceback
    # The thread of a progress bar may have held locks of these streams when this process was forked.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
