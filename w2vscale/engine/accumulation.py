"""Gradient accumulation over a window: split it into forwards, and run them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from w2vscale.data.inputs import join, tensors_of, to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.objectives import StepContext, Sums, add_sums


class Forward(NamedTuple):
    """One forward: the joined inputs of its micro-batches, on the device, and its context."""

    inputs: Any
    step: StepContext
    last: bool  # whether this is the last forward of the window


def split(window: Sequence[MicroBatch], per_forward: int) -> list[Sequence[MicroBatch]]:
    """Split a window into forwards of `per_forward` consecutive micro-batches. The last one may have fewer."""
    return [window[start : start + per_forward] for start in range(0, len(window), per_forward)]


def accumulate(
    groups: Sequence[Sequence[MicroBatch]],
    step: StepContext,
    run: Callable[[Forward], Sums],
    device: torch.device,
    between_forwards: Callable[[], None] | None = None,
) -> Sums:
    """Run each group with `run` (one forward and backward) and return the sums over the window."""
    total: Any = None
    for number, (group, inputs) in enumerate(_copied_ahead(groups, device), start=1):
        if between_forwards is not None and number > 1:
            between_forwards()
        # Joined on the device, because a joined copy on the host would not be in pinned memory.
        context = replace(step, numbers=tuple(batch.number for batch in group))
        sums: Any = run(Forward(join(inputs), context, last=number == len(groups)))
        sums = sums._replace(total=sums.total.detach())
        total = sums if total is None else add_sums(total, sums)
    assert total is not None
    return total


def _copied_ahead(
    groups: Sequence[Sequence[MicroBatch]], device: torch.device
) -> Iterator[tuple[Sequence[MicroBatch], list[Any]]]:
    """Yield each group with its inputs on the device. A separate CUDA stream overlaps copies with computation.

    The first copy overlaps with the end of the previous update, because the host does not wait for its step.
    """
    if device.type != "cuda":
        for group in groups:
            yield group, [to_device(batch.inputs, device) for batch in group]
        return
    computing, copying = torch.cuda.current_stream(device), _copying_stream(device)
    for group in groups:
        with torch.cuda.stream(copying):
            copies = [to_device(batch.inputs, device) for batch in group]
        computing.wait_stream(copying)
        for inputs in copies:
            for _, tensor in tensors_of(inputs):
                tensor.record_stream(computing)  # or the allocator could reuse the memory too early
        yield group, copies


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
