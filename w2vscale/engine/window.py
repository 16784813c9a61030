"""A window, forward by forward: what every engine does between two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import Sums


def accumulate(window: Sequence[MicroBatch], *, concat: int, run: Callable[[Sequence[MicroBatch], bool], Sums]) -> Sums:
    """Sums over a window of which `concat` micro-batches share one forward.

    `run(chunk, last)` takes one forward and backward; `last` says whether it is the window's last.
    """
    chunks = [window[start : start + concat] for start in range(0, len(window), concat)]
    total: Any = None
    for chunk in chunks:
        sums = run(chunk, chunk is chunks[-1])
        sums = sums._replace(total=sums.total.detach())
        total = sums if total is None else total.plus(sums)
    assert total is not None
    return total
