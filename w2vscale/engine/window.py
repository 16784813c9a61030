"""A window, forward by forward: what every engine does between two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from w2vscale.data.inputs import on_stream, to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import Sums


def accumulate(
    chunks: Sequence[Sequence[MicroBatch]], run: Callable[[Sequence[MicroBatch], bool], Sums], device: torch.device
) -> Sums:
    """Sums over a window, cut into what shares a forward.

    `run(chunk, last)` takes one forward and backward; `last` says whether it is the window's last.
    """
    total: Any = None
    for number, chunk in enumerate(_copied_ahead(chunks, device), start=1):
        sums = run(chunk, number == len(chunks))
        sums = sums._replace(total=sums.total.detach())
        total = sums if total is None else total.plus(sums)
    assert total is not None
    return total


def _copied_ahead(chunks: Sequence[Sequence[MicroBatch]], device: torch.device) -> Iterator[Sequence[MicroBatch]]:
    """The chunks; a GPU gets them on a stream of their own, each while it still computes what was asked before."""
    if device.type != "cuda":
        yield from chunks
        return
    computing, copying = torch.cuda.current_stream(device), _copying_stream(device)
    for chunk in chunks:
        with torch.cuda.stream(copying):
            copies = [replace(batch, inputs=to_device(batch.inputs, device)) for batch in chunk]
        computing.wait_stream(copying)
        for batch in copies:
            on_stream(batch.inputs, computing)
        yield copies


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
