"""Which utterances form micro-batch k of an endless stream: pure functions of durations and a seed.

Utterances are sorted by length and cut into buckets. A bucket's number of utterances per micro-batch follows from
its longest utterance, and buckets end on whole micro-batches, so that one micro-batch an epoch at most is partly
filled. Every epoch shuffles inside the buckets and then shuffles the micro-batches; neither changes their number,
so `epoch, i = divmod(k, plan.per_epoch)` and any position is reached without replay.

In a mixed corpus an epoch draws each group's utterances more or less often than once. Its draws, not its utterances,
are what is sorted and cut into buckets; which utterance a draw takes changes from epoch to epoch, its length hardly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError

MICRO_BATCHES_PER_BUCKET = 4
"""A bucket holds at least this many micro-batches, so that small corpora still mix their utterances."""


@dataclass(frozen=True)
class Bucket:
    """A run of draws of similar length, in the plan's sorted order."""

    start: int
    count: int
    longest: int
    per_micro_batch: int
    first_micro_batch: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch; only the plan's last bucket may fill its last one partly."""
        return -(-self.count // self.per_micro_batch)


@dataclass(frozen=True)
class Mix:
    """How often an epoch draws each utterance, by the group that it belongs to.

    `group` has each utterance's group, `rate` each group's mean number of draws per utterance and epoch.
    """

    group: NDArray[np.integer]
    rate: NDArray[np.float64]


class _MixedDraws:
    """Which utterances the draws of an epoch take: systematic sampling of each group in order of length (Madow 1949).

    A group of n utterances with D draws an epoch is one line of n * D points, D to an utterance. An epoch takes every
    n-th point, and the next epoch starts D points further on: after E epochs every utterance has been drawn E * D / n
    times, rounded down or up, and a draw takes utterances of similar length in all epochs. A group has one draw at
    least.

    Args:
        group: each utterance's group, ascending.
        lengths: in samples, descending within a group.
        rate: draws of an utterance in an epoch on average, by group.
        seed: of where a group's line is entered.
    """

    def __init__(
        self, group: NDArray[np.integer], lengths: NDArray[np.int32], rate: NDArray[np.float64], seed: int
    ) -> None:
        groups, self._first, self._utterances = np.unique(group, return_index=True, return_counts=True)
        self._draws = np.maximum(np.rint(rate[groups] * self._utterances).astype(np.int64), 1)
        self._enter = np.array([generator(seed, Stream.MIX, int(of)).integers(2**31) for of in groups])
        of = np.repeat(np.arange(groups.size, dtype=np.int32), self._draws)
        turn = np.arange(of.size) - np.repeat(np.cumsum(self._draws) - self._draws, self._draws)
        longest = lengths[self._first[of] + turn * self._utterances[of] // self._draws[of]]
        order = np.argsort(-longest, kind="stable")
        self.longest = longest[order]
        """Samples of the longest utterance that each draw ever takes, descending."""
        self._of = of[order]
        self._turn = turn[order].astype(np.int32)

    def places(self, draws: NDArray[np.integer], epoch: int) -> NDArray[np.int64]:
        """The utterances that these draws take in an epoch."""
        of = self._of[draws]
        utterances, per_epoch = self._utterances[of], self._draws[of]
        point = self._turn[draws] * utterances + (self._enter[of] + epoch * per_epoch) % utterances
        places: NDArray[np.int64] = self._first[of] + point // per_epoch
        return places


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Micro-batch `number`: utterances (numbers in the corpus), crop offsets and lengths in samples.

    They are padded to the longest, and to no less than `width` samples.
    """

    number: int
    epoch: int
    utterances: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    width: int

    @property
    def longest(self) -> int:
        """Samples of the longest utterance."""
        return int(self.lengths.max())


class Plan:
    """The endless stream of micro-batches of one corpus.

    Args:
        samples: length of each utterance, in samples.
        max_samples: longer utterances are cropped to this at a random offset.
        min_samples: shorter utterances are left out.
        budget_samples: padded samples of one micro-batch, at most.
        buckets: duration buckets, at most.
        seed: of order and crops.
        pad_to_bucket: pad every micro-batch to its bucket's longest utterance, so that there are few shapes, instead
            of to its own longest.
        mix: draws some utterances more often than others; without it, an epoch has each once.

    Raises:
        UserError: no utterance is long enough.
    """

    def __init__(
        self,
        samples: NDArray[np.int64],
        *,
        max_samples: int,
        min_samples: int,
        budget_samples: int,
        buckets: int,
        seed: int,
        pad_to_bucket: bool = False,
        mix: Mix | None = None,
    ) -> None:
        assert 0 < max_samples <= budget_samples < 2**31
        kept = np.flatnonzero(samples >= max(min_samples, 1))
        if kept.size == 0:
            raise UserError(
                f"no utterance is long enough: none of the {samples.size} lasts {min_samples} samples "
                f"(data.min_seconds); the longest lasts {samples.max(initial=0)}"
            )
        # Four bytes each: ten million utterances take 120 MB.
        cropped = np.minimum(samples[kept], max_samples).astype(np.int32)
        group = mix.group[kept] if mix else None
        order = np.argsort(-cropped, kind="stable") if group is None else np.lexsort((-cropped, group))
        self.seed = seed
        self.left_out = int(samples.size - kept.size)
        self._utterances = kept[order].astype(np.int32)
        self._lengths = cropped[order]
        self._rooms = (samples[self._utterances] - self._lengths).clip(0, 2**32 - 1).astype(np.uint32)
        self._pad_to_bucket = pad_to_bucket
        self._mixed = _MixedDraws(group[order], self._lengths, mix.rate, seed) if mix and group is not None else None
        longest = self._mixed.longest if self._mixed else self._lengths
        self.buckets = make_buckets(longest, budget_samples=budget_samples, buckets=buckets)
        last = self.buckets[-1]
        self.per_epoch = last.first_micro_batch + last.micro_batches
        self._firsts = np.array([bucket.first_micro_batch for bucket in self.buckets])
        self._make_caches()

    def __len__(self) -> int:
        """Utterances in one epoch."""
        return sum(bucket.count for bucket in self.buckets)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_epoch_order", "_bucket_order")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _make_caches(self) -> None:
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._bucket_order = lru_cache(maxsize=2 * len(self.buckets))(self._shuffle_bucket)

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """Micro-batch `number` (0, 1, …, without end), in time that does not depend on `number`."""
        epoch, position = divmod(number, self.per_epoch)
        index = int(self._epoch_order(epoch)[position])
        which = int(np.searchsorted(self._firsts, index, side="right")) - 1
        bucket = self.buckets[which]
        first = (index - bucket.first_micro_batch) * bucket.per_micro_batch
        draws = bucket.start + self._bucket_order(epoch, which)[first : first + bucket.per_micro_batch]
        members = self._taken(draws, epoch)
        utterances, lengths, room = (
            part[members].astype(np.int64) for part in (self._utterances, self._lengths, self._rooms)
        )
        offsets = np.zeros_like(room)
        if room.any():
            draws = generator(self.seed, Stream.CROP, number).random(room.size)
            offsets = np.minimum(np.floor(draws * (room + 1)).astype(np.int64), room)
        return PlannedMicroBatch(
            number,
            epoch,
            utterances,
            offsets,
            lengths,
            width=bucket.longest if self._pad_to_bucket else 0,
        )

    def largest(self) -> int:
        """The number of the epoch-0 micro-batch with the most padded samples: the one that needs most memory."""
        return int(np.argmax(self._padded_samples()[self._epoch_order(0)]))

    def largest_of_buckets(self, falling: float) -> list[int]:
        """The numbers of the micro-batches of epoch 0 with the most padded samples in their bucket, the longest first;
        of buckets that are each shorter than `falling` times the one before."""
        padded, place = self._padded_samples(), np.argsort(self._epoch_order(0))
        found, last = [], float("inf")
        for bucket in self.buckets:
            if bucket.longest < falling * last:
                first, last = bucket.first_micro_batch, bucket.longest
                found.append(int(place[first + np.argmax(padded[first : first + bucket.micro_batches])]))
        return found

    def padding(self) -> float:
        """Share of padded samples in epoch 0 that hold no audio."""
        audio = sum(
            int(self._lengths[self._members(0, which)].sum(dtype=np.int64)) for which in range(len(self.buckets))
        )
        return 1.0 - audio / int(self._padded_samples().sum())

    def epoch_draws(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Utterances (numbers in the corpus) of epoch 0 and their lengths in samples, in no particular order."""
        members = np.concatenate([self._members(0, which) for which in range(len(self.buckets))])
        return self._utterances[members].astype(np.int64), self._lengths[members].astype(np.int64)

    def _members(self, epoch: int, which: int) -> NDArray[np.integer]:
        """A bucket's utterances of one epoch in order, as places in the plan's arrays."""
        return self._taken(self.buckets[which].start + self._bucket_order(epoch, which), epoch)

    def _taken(self, draws: NDArray[np.integer], epoch: int) -> NDArray[np.integer]:
        """The utterances that an epoch's draws take, as places in the plan's arrays."""
        return self._mixed.places(draws, epoch) if self._mixed else draws

    def _padded_samples(self) -> NDArray[np.int64]:
        """Padded samples of each micro-batch of epoch 0, before the epoch's micro-batches are shuffled."""
        padded = []
        for which, bucket in enumerate(self.buckets):
            starts = np.arange(0, bucket.count, bucket.per_micro_batch)
            sizes = np.diff(starts, append=bucket.count)
            if self._pad_to_bucket:
                padded.append(bucket.longest * sizes)
            else:
                lengths = self._lengths[self._members(0, which)]
                padded.append(np.maximum.reduceat(lengths, starts).astype(np.int64) * sizes)
        return np.concatenate(padded)

    def _shuffle_epoch(self, epoch: int) -> NDArray[np.int32]:
        order = np.arange(self.per_epoch, dtype=np.int32)
        return generator(self.seed, Stream.EPOCH_ORDER, epoch).permutation(order)

    def _shuffle_bucket(self, epoch: int, which: int) -> NDArray[np.int32]:
        order = np.arange(self.buckets[which].count, dtype=np.int32)
        return generator(self.seed, Stream.BUCKET_ORDER, epoch, which).permutation(order)


def make_buckets(lengths: NDArray[np.integer], *, budget_samples: int, buckets: int) -> list[Bucket]:
    """Cut lengths, longest first, into at most `buckets` runs that end on whole micro-batches.

    Utterances as long as a bucket's longest all belong to it: cropped corpora have many, and must mix.
    """
    total = int(lengths.size)
    share = -(-total // buckets)
    found: list[Bucket] = []
    start = first = 0
    while start < total:
        longest = int(lengths[start])
        per_micro_batch = budget_samples // longest
        equally_long = int(np.searchsorted(-lengths, -longest, side="right")) - start
        wanted = max(share, MICRO_BATCHES_PER_BUCKET * per_micro_batch, equally_long)
        count = -(-wanted // per_micro_batch) * per_micro_batch
        if total - start - count < count // 2:
            count = total - start
        bucket = Bucket(start, count, longest, per_micro_batch, first)
        found.append(bucket)
        start += count
        first += bucket.micro_batches
    return found


def rank_window(plan: Plan, update: int, *, micro_batches: int, rank: int, world_size: int) -> list[int]:
    """The micro-batches that `rank` runs in update `update`, longest first.

    The update's micro-batches [update * N, (update + 1) * N) are sorted by length and dealt like cards, so that in
    each sub-step all ranks have utterances of about the same length. Which micro-batches form the update does not
    depend on the number of ranks.
    """
    assert micro_batches % world_size == 0
    numbers = range(update * micro_batches, (update + 1) * micro_batches)
    if micro_batches == 1:
        return list(numbers)
    ordered = sorted(numbers, key=lambda number: (-plan.micro_batch(number).longest, number))
    return ordered[rank::world_size]


def window_numbers(plan: Plan, *, updates: range, micro_batches: int, rank: int, world_size: int) -> Iterator[int]:
    """The number of every micro-batch that `rank` runs in `updates`, in order."""
    for update in updates:
        yield from rank_window(plan, update, micro_batches=micro_batches, rank=rank, world_size=world_size)
