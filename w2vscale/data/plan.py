"""Which utterances form micro-batch k of an endless stream: pure functions of durations and a seed.

Utterances are sorted by length and cut into buckets. A bucket's number of utterances per micro-batch follows from
its longest utterance, and buckets end on whole micro-batches, so that one micro-batch an epoch at most is partly
filled. Every epoch shuffles inside the buckets and then shuffles the micro-batches; neither changes their number,
so `epoch, i = divmod(k, plan.per_epoch)` and any position is reached without replay.
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
    """A run of utterances of similar length, in the plan's sorted order."""

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
class PlannedMicroBatch:
    """Micro-batch `number`: utterances (numbers in the corpus), crop offsets and lengths in samples."""

    number: int
    epoch: int
    utterances: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def longest(self) -> int:
        """Samples of the longest utterance: what the others are padded to."""
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
    ) -> None:
        assert 0 < max_samples <= budget_samples
        samples = np.asarray(samples, dtype=np.int64)
        kept = np.flatnonzero(samples >= max(min_samples, 1))
        if kept.size == 0:
            raise UserError(
                f"no utterance is long enough: none of the {samples.size} lasts {min_samples} samples "
                f"(data.min_seconds); the longest lasts {samples.max(initial=0)}"
            )
        cropped = np.minimum(samples[kept], max_samples)
        order = np.argsort(-cropped, kind="stable")
        self.seed = seed
        self.left_out = int(samples.size - kept.size)
        self._utterances = kept[order]
        self._lengths = cropped[order]
        self._samples = samples
        self.buckets = make_buckets(self._lengths, budget_samples=budget_samples, buckets=buckets)
        last = self.buckets[-1]
        self.per_epoch = last.first_micro_batch + last.micro_batches
        self._firsts = np.array([bucket.first_micro_batch for bucket in self.buckets])
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._bucket_order = lru_cache(maxsize=2 * len(self.buckets))(self._shuffle_bucket)

    def __len__(self) -> int:
        """Utterances in one epoch."""
        return int(self._utterances.size)

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        del state["_epoch_order"], state["_bucket_order"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._bucket_order = lru_cache(maxsize=2 * len(self.buckets))(self._shuffle_bucket)

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """Micro-batch `number` (0, 1, …, without end), in time that does not depend on `number`."""
        epoch, position = divmod(number, self.per_epoch)
        index = int(self._epoch_order(epoch)[position])
        which = int(np.searchsorted(self._firsts, index, side="right")) - 1
        bucket = self.buckets[which]
        first = (index - bucket.first_micro_batch) * bucket.per_micro_batch
        members = bucket.start + self._bucket_order(epoch, which)[first : first + bucket.per_micro_batch]
        utterances, lengths = self._utterances[members], self._lengths[members]
        room = self._samples[utterances] - lengths
        offsets = np.floor(generator(self.seed, Stream.CROP, number).random(room.size) * (room + 1))
        return PlannedMicroBatch(number, epoch, utterances, np.minimum(offsets.astype(np.int64), room), lengths)

    def largest(self) -> int:
        """The number of the epoch-0 micro-batch with the most padded samples: the one that needs most memory."""
        return int(np.argmax(self._padded_samples()[self._epoch_order(0)]))

    def padding(self) -> float:
        """Share of padded samples in epoch 0 that hold no audio."""
        return 1.0 - int(self._lengths.sum()) / int(self._padded_samples().sum())

    def _padded_samples(self) -> NDArray[np.int64]:
        """Padded samples of each micro-batch of epoch 0, before the epoch's micro-batches are shuffled."""
        padded = []
        for which, bucket in enumerate(self.buckets):
            lengths = self._lengths[bucket.start + self._bucket_order(0, which)]
            starts = np.arange(0, bucket.count, bucket.per_micro_batch)
            sizes = np.diff(starts, append=bucket.count)
            padded.append(np.maximum.reduceat(lengths, starts) * sizes)
        return np.concatenate(padded)

    def _shuffle_epoch(self, epoch: int) -> NDArray[np.int64]:
        return generator(self.seed, Stream.EPOCH_ORDER, epoch).permutation(self.per_epoch)

    def _shuffle_bucket(self, epoch: int, which: int) -> NDArray[np.int64]:
        return generator(self.seed, Stream.BUCKET_ORDER, epoch, which).permutation(self.buckets[which].count)


def make_buckets(lengths: NDArray[np.int64], *, budget_samples: int, buckets: int) -> list[Bucket]:
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


def window_numbers(
    plan: Plan, *, updates: range, micro_batches: int, rank: int, world_size: int
) -> Iterator[tuple[int, int]]:
    """(update, micro-batch number) of every micro-batch that `rank` runs in `updates`, in order."""
    for update in updates:
        for number in rank_window(plan, update, micro_batches=micro_batches, rank=rank, world_size=world_size):
            yield update, number
