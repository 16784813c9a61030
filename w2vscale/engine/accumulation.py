"""Gradient accumulation over a window: group micro-batches into forwards, and run them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from w2vscale.data.inputs import join, tensors_of, to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import largest_over_ranks
from w2vscale.objectives import StepContext, Sums, add_sums

ADDED_PADDING = 0.05  # maximum padding that grouping may add, as a fraction of the samples


class Capacity(NamedTuple):
    """The number of padded `samples` that fit into one forward, for utterances of at most `width` samples."""

    width: int
    samples: int


class Grouping(Protocol):
    """Decides which micro-batches share a forward."""

    def groups(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        """Split a window into groups, equally many on all ranks. Collective."""


@dataclass(frozen=True)
class FixedGrouping:
    """Groups `count` micro-batches per forward; the last group may have fewer."""

    count: int

    def groups(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        return [window[start : start + self.count] for start in range(0, len(window), self.count)]


@dataclass(frozen=True)
class FittingGrouping:
    """Groups as many micro-batches of similar length as fit into memory. `capacities` has the largest width first."""

    capacities: tuple[Capacity, ...]

    def groups(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        """Uses the largest sizes over all ranks, so that all ranks form the same groups."""
        shapes = [size for batch in window for size in batch.inputs.audio.waveforms_BS.shape]
        largest = [int(size) for size in largest_over_ranks(shapes)]
        found, start = [], 0
        while start < len(window):
            rows = samples = widest = 0
            end = start
            for count, width in zip(largest[2 * start :: 2], largest[2 * start + 1 :: 2], strict=True):
                rows, samples, widest = rows + count, samples + count * width, max(widest, width)
                padded = rows * widest
                if end > start and (padded > self._capacity(widest) or padded > (1.0 + ADDED_PADDING) * samples):
                    break
                end += 1
            found.append(window[start:end])
            start = end
        return found

    def _capacity(self, width: int) -> int:
        return next(
            (one.samples for one in reversed(self.capacities) if one.width >= width), self.capacities[0].samples
        )


class Forward(NamedTuple):
    """One forward: the joined inputs of a group, on the device, and its context."""

    inputs: Any
    step: StepContext
    last: bool  # whether this is the last forward of the window


def accumulate(
    groups: Sequence[Sequence[MicroBatch]], step: StepContext, run: Callable[[Forward], Sums], device: torch.device
) -> Sums:
    """Run each group with `run` (one forward and backward) and return the sums over the window."""
    total: Any = None
    for number, (group, inputs) in enumerate(_copied_ahead(groups, device), start=1):
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
