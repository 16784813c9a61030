"""A function over many chunks of work in forked processes: in order, with few chunks in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from w2vscale.errors import UserError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_function: Callable[[Any], Any]


class WorkerDied(UserError):
    """A worker process ended without an answer."""


def parallel_map(
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], *, jobs: int, source: Path, isolate: bool = False
) -> Iterator[Result]:
    """`function` of each chunk, in the chunks' order, by `jobs` processes; at most 2 × `jobs` chunks are under way.

    The processes are forked, so that `function` may hold anything; chunks and results are pickled. One job runs in
    this process, unless it is to be isolated from what could crash it. No process outlives its parent.

    Raises:
        WorkerDied: a process was killed or crashed; names `source`, what the work is on.
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
            f"{source}: a worker process died: killed, for memory perhaps (use fewer --jobs), or crashed in a library"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in a shell's background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; its traceback is the parent's
    # A progress bar's thread may have held the streams' locks when this process was forked.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
