"""A window, forward by forward: what every engine does between two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import Sums


def accumulate(chunks: Sequence[Sequence[MicroBatch]], run: Callable[[Sequence[MicroBatch], bool], Sums]) -> Sums:
    """Sums over a window, cut into what shares a forward.

    `run(chunk, last)` takes one forward and backward; `last` says whether it is the window's last.
    """
    total: Any = None
    for chunk in chunks:
        sums = run(chunk, chunk is chunks[-1])
        sums = sums._replace(total=sums.total.detach())
        total = sums if total is None else total.plus(sums)
    assert total is not None
    return total
