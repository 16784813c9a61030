"""The plan: which utterances form micro-batch k of an endless stream, as a pure function of durations and a seed.

Utterances are sorted by length and cut into duration buckets. The longest utterance of a bucket determines how many
utterances a micro-batch of this bucket holds. Micro-batches come in series: `series_length` consecutive ones are from
the same bucket, so that they can share a forward with little padding. Buckets end on whole series, so at most one
series per epoch has room left. Every epoch shuffles the utterances inside each bucket, then the series. The number of
micro-batches stays the same, so `epoch, i = divmod(k, plan.per_epoch)` reaches any position without replay.

In a mixed corpus, an epoch draws the utterances of a group more or less often than once. Then the draws are sorted and
cut into buckets instead of the utterances. A draw takes different utterances in different epochs, but always of
similar length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from w2vscale.config import BatchConfig
from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError

MICRO_BATCHES_PER_BUCKET = 4  # at least, so that even in a small corpus micro-batches change between epochs
SERIES_PER_UPDATE = 4  # at least, so that an update has utterances of several lengths
ADDED_MICRO_BATCHES = 0.05  # maximum number that whole series may add to an epoch, as a fraction

Index = TypeVar("Index", int, NDArray[np.int64])


@dataclass(frozen=True)
class Bucket:
    """Consecutive draws of similar length, in the sorted order of the plan. Lengths are in samples."""

    start: int
    count: int
    longest: int
    per_micro_batch: int  # at most
    first_micro_batch: int
    series_length: int

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per epoch: whole series."""
        return -(-self.count // (self.per_micro_batch * self.series_length)) * self.series_length

    @property
    def added(self) -> int:
        """Number of micro-batches that whole series add to those that its utterances need."""
        return self.micro_batches - -(-self.count // self.per_micro_batch)

    @property
    def most(self) -> int:
        """Number of utterances of its largest micro-batch."""
        if self.series_length == 1:
            return min(self.per_micro_batch, self.count)
        return -(-self.count // self.micro_batches)

    def begin(self, micro_batch: Index) -> Index:
        """Return the position in the bucket of the first draw of its micro-batch 0, 1, ….

        Only the last bucket can have too few draws to fill its micro-batches. It deals them evenly, or, with series of
        one micro-batch, fills all micro-batches but the last.
        """
        if self.series_length == 1:
            return micro_batch * self.per_micro_batch
        return micro_batch * self.count // self.micro_batches


class Mix(NamedTuple):
    """How often an epoch draws the utterances of each group."""

    group: NDArray[np.integer]  # of each utterance
    rate: NDArray[np.float64]  # mean number of draws per utterance and epoch, of each group


class _MixedDraws:
    """Maps the draws of an epoch to utterances: systematic sampling of each group in order of length (Madow 1949).

    Think of a group with n utterances and D draws per epoch as a row of n * D points, D consecutive points for each
    utterance. An epoch takes every n-th point, and each epoch starts D points after the previous one. After E epochs,
    every utterance has been drawn E * D / n times, rounded down or up, and each draw has taken utterances of similar
    length. A group has at least one draw per epoch, and a random starting point.

    Utterances are sorted by `group` and then by falling length; `lengths` are in samples.
    """

    def __init__(
        self, group: NDArray[np.integer], lengths: NDArray[np.int32], rate: NDArray[np.float64], seed: int
    ) -> None:
        groups, self._first, self._utterances = np.unique(group, return_index=True, return_counts=True)
        self._draws = np.maximum(np.rint(rate[groups] * self._utterances).astype(np.int64), 1)
        self._start = np.array([generator(seed, Stream.MIX, int(each)).integers(2**31) for each in groups])
        owner = np.repeat(np.arange(groups.size, dtype=np.int32), self._draws)
        index = np.arange(owner.size) - np.repeat(np.cumsum(self._draws) - self._draws, self._draws)
        longest = lengths[self._first[owner] + index * self._utterances[owner] // self._draws[owner]]
        order = np.argsort(-longest, kind="stable")
        self.longest = longest[order]  # samples of the longest utterance that each draw takes in any epoch, descending
        self._owner = owner[order]
        self._index = index[order].astype(np.int32)

    def places(self, draws: NDArray[np.integer], epoch: int) -> NDArray[np.int64]:
        """Return the utterances that `draws` take in `epoch`, as positions in the sorted arrays."""
        owner = self._owner[draws]
        utterances, per_epoch = self._utterances[owner], self._draws[owner]
        point = self._index[draws] * utterances + (self._start[owner] + epoch * per_epoch) % utterances
        places: NDArray[np.int64] = self._first[owner] + point // per_epoch
        return places


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Micro-batch `number`: crops of utterances, padded to the longest of them and to at least `width` samples."""

    number: int
    epoch: int
    utterances: NDArray[np.int64]  # indices into the corpus
    offsets: NDArray[np.int64]  # in samples
    lengths: NDArray[np.int64]  # in samples
    width: int

    @property
    def longest(self) -> int:
        """Length of the longest utterance in samples."""
        return int(self.lengths.max())


class Plan:
    """The endless stream of micro-batches of one corpus, whose utterances have the lengths `samples`.

    Utterances shorter than `min_samples` are left out, those longer than `max_samples` cropped at a random offset.
    Micro-batches have at most `budget_samples`, including padding: to the longest utterance of the micro-batch, or,
    with `pad_to_bucket`, of the bucket, to get fewer shapes. There are at most `buckets` buckets. Without `mix`, every
    utterance is drawn once per epoch. A small corpus gets a divisor of `series_length` (see `make_buckets`), unless
    `fixed_series` is set.

    Raises UserError if no utterance is long enough.
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
        series_length: int = 1,
        pad_to_bucket: bool = False,
        mix: Mix | None = None,
        fixed_series: bool = False,
    ) -> None:
        assert 0 < max_samples <= budget_samples < 2**31
        kept = long_enough(samples, min_samples)
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
        make = cut_into_buckets if fixed_series else make_buckets
        self.buckets = make(longest, budget_samples=budget_samples, buckets=buckets, series_length=series_length)
        last = self.buckets[-1]
        self.series_length = last.series_length
        self.per_epoch = last.first_micro_batch + last.micro_batches
        self._firsts = np.array([bucket.first_micro_batch for bucket in self.buckets])

    def __len__(self) -> int:
        """Number of utterances drawn per epoch."""
        return sum(bucket.count for bucket in self.buckets)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    @cached_property
    def _order(self) -> Callable[..., NDArray[np.int32]]:
        return lru_cache(maxsize=2 * (len(self.buckets) + 1))(self._shuffle)  # what two epochs need

    def _shuffle(self, count: int, stream: Stream, *numbers: int) -> NDArray[np.int32]:
        return generator(self.seed, stream, *numbers).permutation(np.arange(count, dtype=np.int32))

    def _epoch_order(self, epoch: int) -> NDArray[np.int32]:
        """Return the order of the series of an epoch."""
        return self._order(self.per_epoch // self.series_length, Stream.EPOCH_ORDER, epoch)

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """Return micro-batch `number` (0, 1, …, without end), in constant time."""
        epoch, bucket, members = self._locate(number)
        utterances, lengths, room = (
            part[members].astype(np.int64) for part in (self._utterances, self._lengths, self._rooms)
        )
        offsets = np.zeros_like(room)
        if room.any():
            draws = generator(self.seed, Stream.CROP, number).random(room.size)
            offsets = np.minimum(np.floor(draws * (room + 1)).astype(np.int64), room)
        width = bucket.longest if self._pad_to_bucket else 0
        return PlannedMicroBatch(number, epoch, utterances, offsets, lengths, width)

    def lengths(self, number: int) -> NDArray[np.int32]:
        """Return the lengths of the utterances of micro-batch `number`, in samples."""
        return self._lengths[self._locate(number)[2]]

    def _locate(self, number: int) -> tuple[int, Bucket, NDArray[np.integer]]:
        """Return the epoch and bucket of a micro-batch, and its utterances as positions in the sorted arrays."""
        epoch, position = divmod(number, self.per_epoch)
        series, place = divmod(position, self.series_length)
        index = int(self._epoch_order(epoch)[series]) * self.series_length + place
        which = int(np.searchsorted(self._firsts, index, side="right")) - 1
        bucket = self.buckets[which]
        inside = index - bucket.first_micro_batch
        return epoch, bucket, self._members(epoch, which, slice(bucket.begin(inside), bucket.begin(inside + 1)))

    def largest(self) -> int:
        """Return the number of the micro-batch of epoch 0 with the most padded samples."""
        return int(np.argmax(self._padded_samples()[self._first_epoch()]))

    def longest(self) -> int:
        """Return the number of the largest micro-batch of epoch 0 in the bucket of the longest utterances."""
        index = np.argmax(self._padded_samples()[: self.buckets[0].micro_batches])
        return int(np.flatnonzero(self._first_epoch() == index)[0])

    def _first_epoch(self) -> NDArray[np.int64]:
        """Return the place of each micro-batch of epoch 0 before the series are shuffled."""
        series = self._epoch_order(0).astype(np.int64)
        return (series[:, None] * self.series_length + np.arange(self.series_length)).ravel()

    def padding(self) -> float:
        """Return the fraction of padded samples in epoch 0 that are padding."""
        _, lengths = self.epoch_draws()
        return 1.0 - int(lengths.sum()) / int(self._padded_samples().sum())

    def epoch_draws(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the utterances (indices into the corpus) of epoch 0 and their lengths in samples, in no set order."""
        members = np.concatenate([self._members(0, which) for which in range(len(self.buckets))])
        return self._utterances[members].astype(np.int64), self._lengths[members].astype(np.int64)

    def _members(self, epoch: int, which: int, part: slice = slice(None)) -> NDArray[np.integer]:
        """Return the utterances of (part of) a bucket in the order of `epoch`, as positions in the sorted arrays."""
        bucket = self.buckets[which]
        draws = bucket.start + self._order(bucket.count, Stream.BUCKET_ORDER, epoch, which)[part]
        return self._mixed.places(draws, epoch) if self._mixed else draws

    def _padded_samples(self) -> NDArray[np.int64]:
        """Return the padded samples of each micro-batch of epoch 0, before the series are shuffled."""
        padded = []
        for which, bucket in enumerate(self.buckets):
            starts = bucket.begin(np.arange(bucket.micro_batches))
            sizes = np.diff(starts, append=bucket.count)
            if self._pad_to_bucket:
                padded.append(bucket.longest * sizes)
            else:
                lengths = self._lengths[self._members(0, which)]
                padded.append(np.maximum.reduceat(lengths, starts).astype(np.int64) * sizes)
        return np.concatenate(padded)


def long_enough(samples: NDArray[np.int64], min_samples: int) -> NDArray[np.int64]:
    """Return the places of the utterances with at least `min_samples` samples. Raises UserError if there are none."""
    kept = np.flatnonzero(samples >= max(min_samples, 1))
    if kept.size == 0:
        raise UserError(
            f"no utterance is long enough: none of the {samples.size} lasts {min_samples} samples "
            f"(data.min_seconds); the longest lasts {samples.max(initial=0)}"
        )
    return kept


def make_buckets(
    lengths: NDArray[np.integer], *, budget_samples: int, buckets: int, series_length: int = 1
) -> list[Bucket]:
    """Cut `lengths` (in samples, longest first) into at most `buckets` buckets that end on whole series.

    Series get the largest divisor of `series_length` with which no micro-batch is empty and an epoch has at most
    `ADDED_MICRO_BATCHES` more micro-batches than its utterances need.
    """
    length = series_length
    while True:
        found = cut_into_buckets(lengths, budget_samples=budget_samples, buckets=buckets, series_length=length)
        last = found[-1]
        total = last.first_micro_batch + last.micro_batches
        if last.count >= last.micro_batches and last.added <= ADDED_MICRO_BATCHES * total:
            return found
        length = largest_divisor(series_length, at_most=length - 1)


def cut_into_buckets(
    lengths: NDArray[np.integer], *, budget_samples: int, buckets: int, series_length: int
) -> list[Bucket]:
    """Cut `lengths` (in samples, longest first) into buckets that end on whole series.

    A bucket includes all utterances as long as its longest one: in a cropped corpus there are many, and they should
    be shuffled together.
    """
    total = int(lengths.size)
    share = -(-total // buckets)
    found: list[Bucket] = []
    start = first = 0
    while start < total:
        longest = int(lengths[start])
        per_micro_batch = budget_samples // longest
        per_series = per_micro_batch * series_length
        equally_long = int(np.searchsorted(-lengths, -longest, side="right")) - start
        wanted = max(share, MICRO_BATCHES_PER_BUCKET * per_micro_batch, equally_long)
        count = -(-wanted // per_series) * per_series
        if total - start - count < count // 2:
            count = total - start
        found.append(Bucket(start, count, longest, per_micro_batch, first, series_length))
        start += count
        first += found[-1].micro_batches
    return found


def rank_window(plan: Plan, update: int, *, micro_batches: int, rank: int, world_size: int) -> list[int]:
    """Return the micro-batches that `rank` runs in update `update`, longest first.

    The N micro-batches [update * N, (update + 1) * N) of the update are whole series, which are sorted by length. They
    are dealt to the ranks in turn, in runs of `run_length` micro-batches, so that in each sub-step all ranks have
    utterances of similar length. The micro-batches of an update do not depend on the number of ranks.
    """
    assert micro_batches % world_size == 0 and micro_batches % plan.series_length == 0
    first, length = update * micro_batches, plan.series_length
    longest = np.array([plan.lengths(number).max() for number in range(first, first + micro_batches)])
    longest = longest.reshape(-1, length)  # series, place
    series = np.argsort(-longest.max(axis=1), kind="stable")
    places = np.argsort(-longest[series], axis=1, kind="stable")
    runs = (first + length * series[:, None] + places).reshape(
        -1, world_size, run_length(length, per_rank=micro_batches // world_size)
    )
    numbers: list[int] = runs[:, rank].ravel().tolist()
    return numbers


def run_length(series_length: int, *, per_rank: int) -> int:
    """Return how many consecutive micro-batches of a window are of one series.

    Windows of `per_rank` micro-batches consist of whole runs, and no run crosses a series. So it is the greatest common
    divisor of both: the smaller one, if both are powers of two.
    """
    return math.gcd(series_length, per_rank)


def length_of_series(batch: BatchConfig) -> int:
    """Return how many micro-batches form a series: a divisor of `batch.micro_batches`, so that no update cuts one."""
    most = min(batch.same_bucket, batch.micro_batches // SERIES_PER_UPDATE)
    return largest_divisor(batch.micro_batches, at_most=max(most, 1))


def largest_divisor(number: int, *, at_most: int) -> int:
    """Return the largest divisor of `number` that is at most `at_most`."""
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)
