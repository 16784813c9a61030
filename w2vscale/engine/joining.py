"""Which micro-batches of a window share a forward. All ranks take the same number of forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import largest_over_ranks

ADDED_PADDING = 0.05
"""What padding to the longest of several micro-batches may add, as a share of their samples."""


class Capacity(NamedTuple):
    """How much of utterances that are at most `width` samples long fits into one forward, in padded samples."""

    width: int
    samples: int


class Joining(Protocol):
    """A rule of joining micro-batches."""

    def chunks(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        """The window, cut into what shares a forward. Collective."""


@dataclass(frozen=True)
class FixedJoining:
    """So many to a forward; the last may have fewer."""

    count: int

    def chunks(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        """See `Joining.chunks`."""
        return [window[start : start + self.count] for start in range(0, len(window), self.count)]


@dataclass(frozen=True)
class FittingJoining:
    """As many as fit, of those that are of similar length. `capacities`: the longest first."""

    capacities: tuple[Capacity, ...]

    def chunks(self, window: Sequence[MicroBatch]) -> list[Sequence[MicroBatch]]:
        """See `Joining.chunks`. Every rank is given what fits the one that has most."""
        shapes = [size for batch in window for size in batch.inputs.waveforms_BS.shape]
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


def joining(concat: int | Literal["auto"]) -> Joining:
    """What `batch.concat` asks for; `auto` needs to be measured (`training/calibration.py`), and joins nothing yet."""
    return FixedJoining(1 if concat == "auto" else concat)
