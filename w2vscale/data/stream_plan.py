"""The plan of a stream of shards: which utterances form micro-batch k, such that shards are read in sequence.

The shards are put end to end in an order drawn from the seed, and cut into blocks of utterances that fit into memory.
Each block has its own small `Plan`. An update takes series from several blocks, its lanes: every epoch puts the series
of all blocks one after another, cuts this sequence into lanes of equal length, and advances in all lanes in turn. So
micro-batch k is a pure function of (seed, k), which is reached without replay, and only one block per lane is needed at
any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2vscale.data.plan import (
    ADDED_MICRO_BATCHES,
    Plan,
    PlannedMicroBatch,
    cut_into_buckets,
    largest_divisor,
    long_enough,
)
from w2vscale.data.randomness import Stream, derived_seed, generator


class _Place(NamedTuple):
    """Where a micro-batch is: in the block at place `which` of the order of `epoch`, as its micro-batch `inside`."""

    epoch: int
    lane: int
    which: int
    inside: int


class _Blocks(NamedTuple):
    """What is known of each block before its plan is made."""

    series: NDArray[np.int64]  # number per epoch
    largest: NDArray[np.int64]  # padded samples that a micro-batch can have
    longest: NDArray[np.int64]  # samples of the longest utterance
    added: int  # micro-batches per epoch, of all blocks, that whole series add
    fits: bool  # whether no micro-batch is empty


class StreamPlan:
    """The endless stream of micro-batches of shards, whose utterances have the lengths `samples`.

    Shard s has the utterances from `starts[s]` up to `starts[s + 1]`. A block has at most `block_size` utterances, and
    at least half as many if the stream has. An update has `micro_batches` micro-batches, a multiple of `series_length`.
    The other arguments are those of `Plan`. All blocks have series of the same length: the largest divisor of
    `series_length` with which no micro-batch is empty and an epoch has at most `ADDED_MICRO_BATCHES` more micro-batches
    than its utterances need.

    Raises UserError if no utterance is long enough.
    """

    def __init__(
        self,
        samples: NDArray[np.int64],
        starts: NDArray[np.int64],
        *,
        block_size: int,
        micro_batches: int,
        max_samples: int,
        min_samples: int,
        budget_samples: int,
        buckets: int,
        seed: int,
        series_length: int = 1,
    ) -> None:
        assert micro_batches % series_length == 0
        self.seed = seed
        self._samples = samples
        self._limits: dict[str, Any] = {"max_samples": max_samples, "min_samples": max(min_samples, 1)}
        self._cutting: dict[str, Any] = {"budget_samples": budget_samples, "buckets": buckets}
        kept = long_enough(samples, min_samples)
        self.left_out = int(samples.size - kept.size)
        bounds = np.searchsorted(kept, starts)
        order = generator(seed, Stream.SHARD_ORDER).permutation(starts.size - 1)
        self._tape = np.concatenate([kept[bounds[shard] : bounds[shard + 1]] for shard in order]).astype(np.int32)
        self._starts, self._chains = _cut_into_blocks(np.diff(bounds)[order], block_size)
        self.series_length, self._blocks = self._whole_series(series_length)
        self.lanes = micro_batches // self.series_length
        self._series = int(self._blocks.series.sum())  # per epoch
        self.per_epoch = self._series * self.series_length

    def __len__(self) -> int:
        """Number of utterances per epoch."""
        return int(self._tape.size)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plan", "_order")}

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """Return micro-batch `number` (0, 1, …, without end)."""
        place, block, plan = self._find(number)
        planned = plan.micro_batch(place.epoch * plan.per_epoch + place.inside)
        return replace(planned, number=number, utterances=self._utterances(block)[planned.utterances])

    def lengths(self, number: int) -> NDArray[np.int32]:
        """Return the lengths of the utterances of micro-batch `number`, in samples."""
        place, _, plan = self._find(number)
        return plan.lengths(place.epoch * plan.per_epoch + place.inside)

    def together(self, number: int) -> NDArray[np.int64]:
        """Return the micro-batches of the same block in the same epoch and lane as micro-batch `number`, ascending.

        They follow each other in their lane, so their utterances should be read together.
        """
        epoch, lane, which, _ = self._locate(number)
        order, firsts = self._order(epoch)
        start, end = self._lane_start(lane), self._lane_start(lane + 1)
        series = np.arange(max(firsts[which], start), min(firsts[which] + self._blocks.series[order[which]], end))
        return self._numbers(epoch, lane, series - start).ravel()

    def largest(self) -> int:
        """Return the number of a micro-batch of epoch 0 with nearly the most padded samples.

        It is the largest of the block that has the most in a bucket, if the longest utterance meets the most others.
        """
        return self._number_in(int(self._blocks.largest.argmax()), Plan.largest)

    def longest(self) -> int:
        """Return the number of the largest micro-batch of epoch 0 in a bucket with the longest utterances."""
        return self._number_in(int(self._blocks.longest.argmax()), Plan.longest)

    def _number_in(self, block: int, choose: Callable[[Plan], int]) -> int:
        """Return the number of the micro-batch of epoch 0 that `choose` chooses in the plan of a block."""
        order, firsts = self._order(0)
        series, inside = divmod(choose(self._plan(block)), self.series_length)
        series += int(firsts[np.flatnonzero(order == block)[0]])
        lanes = self._lane_start(np.arange(self.lanes + 1))
        lane = int(np.searchsorted(lanes, series, side="right")) - 1
        return int(self._numbers(0, lane, np.array([series - lanes[lane]]))[0, inside])

    def _numbers(self, epoch: int, lane: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the micro-batches [rows, place in the series] of a lane."""
        series = epoch * self._series + rows * self.lanes + lane
        return series[:, None] * self.series_length + np.arange(self.series_length)

    def _locate(self, number: int) -> _Place:
        series, inside = divmod(number, self.series_length)
        epoch, series = divmod(series, self._series)
        row, lane = divmod(series, self.lanes)
        at = int(self._lane_start(lane)) + row
        _, firsts = self._order(epoch)
        which = int(np.searchsorted(firsts, at, side="right")) - 1
        return _Place(epoch, lane, which, (at - int(firsts[which])) * self.series_length + inside)

    def _find(self, number: int) -> tuple[_Place, int, Plan]:
        place = self._locate(number)
        block = int(self._order(place.epoch)[0][place.which])
        return place, block, self._plan(block)

    def _lane_start(self, lane: Any) -> Any:
        """Return the first series of a lane, in the sequence of all series of an epoch."""
        each, longer = divmod(self._series, self.lanes)
        return lane * each + np.minimum(lane, longer)

    @cached_property
    def _order(self) -> Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the blocks in the order of an epoch, which keeps chains together, and the first series of each."""
        chains = generator(self.seed, Stream.SHARD_ORDER, epoch).permutation(self._chains.size - 1)
        order = np.concatenate([np.arange(self._chains[chain], self._chains[chain + 1]) for chain in chains])
        return order, np.cumsum(self._blocks.series[order]) - self._blocks.series[order]

    @cached_property
    def _plan(self) -> Callable[[int], Plan]:
        return lru_cache(maxsize=2 * self.lanes)(self._plan_of)

    def _plan_of(self, block: int) -> Plan:
        return Plan(
            self._samples[self._utterances(block)],
            seed=derived_seed(self.seed, Stream.BLOCK, block),
            series_length=self.series_length,
            fixed_series=True,
            **self._limits,
            **self._cutting,
        )

    def _utterances(self, block: int) -> NDArray[np.int64]:
        return self._tape[self._starts[block] : self._starts[block + 1]].astype(np.int64)

    def _whole_series(self, wanted: int) -> tuple[int, _Blocks]:
        """Choose the length of a series: `wanted` or a divisor of it. Returns also the blocks with this length."""
        length = wanted
        while True:
            blocks = self._measure(length)
            added = blocks.added / (int(blocks.series.sum()) * length)
            if blocks.fits and added <= ADDED_MICRO_BATCHES:
                return length, blocks
            length = largest_divisor(wanted, at_most=length - 1)

    def _measure(self, series_length: int) -> _Blocks:
        """Cut each block into buckets as its plan will do."""
        count, longest = self._starts.size - 1, self._limits["max_samples"]
        series, largest, first = (np.zeros(count, np.int64) for _ in range(3))
        added, fits = 0, True
        for block in range(count):
            lengths = np.minimum(self._samples[self._utterances(block)], longest)
            lengths[::-1].sort()
            buckets = cut_into_buckets(lengths, series_length=series_length, **self._cutting)
            last = buckets[-1]
            series[block] = (last.first_micro_batch + last.micro_batches) // series_length
            largest[block] = max(bucket.longest * bucket.most for bucket in buckets)
            first[block] = buckets[0].longest
            added += last.added
            fits = fits and last.count >= last.micro_batches
        return _Blocks(series, largest, first, added, fits)


def _cut_into_blocks(sizes: NDArray[np.int64], block_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut shards of these sizes, end to end, into blocks of at most `block_size` and at least half as many utterances.

    A chain is a few consecutive shards that fit into one block, or consecutive parts of equal size that belong to a
    large shard. Returns the first utterance of each block and the first block of each chain, both with the end.
    """
    chains = [0]
    total = int(sizes.sum())
    end = 0
    for size in sizes.tolist():
        enough = 2 * (end - chains[-1]) >= block_size
        if enough and end + size - chains[-1] > block_size:
            chains.append(end)
        end += size
    if len(chains) > 1 and 2 * (total - chains[-1]) < block_size:
        chains.pop()
    starts: list[int] = []
    firsts: list[int] = []
    for start, stop in zip(chains, [*chains[1:], total], strict=True):
        firsts.append(len(starts))
        parts = -(-(stop - start) // block_size)
        starts += [start + (stop - start) * part // parts for part in range(parts)]
    return np.array([*starts, total]), np.array([*firsts, len(starts)])


@dataclass(frozen=True)
class Share:
    """The micro-batches that one loader process of one rank loads in `updates`: every `processes`-th of the rank's.

    Rank r has the r-th part of each update of `micro_batches` micro-batches. If the number of ranks divides the number
    of lanes, these are its own lanes, and no two ranks read the same block.
    """

    updates: range
    micro_batches: int
    rank: int = 0
    world_size: int = 1
    process: int = 0
    processes: int = 1

    @property
    def per_rank(self) -> int:
        """Number of micro-batches of a window."""
        return self.micro_batches // self.world_size

    def __iter__(self) -> Iterator[int]:
        for turn in range(self.process, len(self.updates) * self.per_rank, self.processes):
            update, place = divmod(turn, self.per_rank)
            yield self.updates[update] * self.micro_batches + self.rank * self.per_rank + place

    def among(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the micro-batches of this share among `numbers`."""
        update, place = np.divmod(numbers, self.micro_batches)
        turn = (update - self.updates.start) * self.per_rank + place - self.rank * self.per_rank
        mine = (place // self.per_rank == self.rank) & (turn % self.processes == self.process)
        return numbers[mine & (update >= self.updates.start) & (update < self.updates.stop)]
