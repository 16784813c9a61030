"""Micro-batches from Lhotse Shar, for corpora that are too large to index or whose storage needs sequential reads.

In every pass the shards are shuffled and dealt to the loader processes of all ranks. In each process, Lhotse's
DynamicBucketingSampler forms runs of micro-batches from one bucket. The stream is endless, so all ranks run the same
number of updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice, pairwise

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.data.assembly import Assembler, Crop
from w2vscale.data.cuts import NotACut
from w2vscale.data.inputs import Utterance
from w2vscale.data.loading import gather_windows, loader_settings
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.plan import largest_divisor, length_of_series, run_length
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.data.shards import find_shards, in_one_line, read_cuts, read_shards
from w2vscale.errors import UserError
from w2vscale.models.lengths import input_samples

UTTERANCES_PER_BUCKET = 50  # at least, in the buffer of a loader process; with fewer, batches would be less random
ENOUGH_BUCKETS = 8  # series are shortened until there are as many buckets
EMPTY_PASSES = 10  # give up after this many passes without a usable utterance


class StreamedMicroBatches:
    """An endless stream of micro-batches of the shards in `data.train`.

    Raises UserError if no shard holds a cut that is long enough, a cut has audio outside of the archives, or the
    objective does not support cropped utterances.
    """

    utterances = micro_batches = None  # unknown without reading all shards

    def __init__(self, assemble: Assembler, *, model: ModelConfig, data: DataConfig, batch: BatchConfig) -> None:
        if not assemble.maker.crops:
            raise UserError("data.mode=stream crops utterances, which this objective cannot use; set data.mode=index")
        self.assemble = assemble
        self.model, self.data, self.batch = model, data, batch
        self.seed = assemble.seed
        self.shortest_seconds = max(
            data.min_seconds, input_samples(assemble.maker.shortest_frames, model) / model.sampling_rate
        )
        self.shards = [shard for folder in data.shard_folders for shard in find_shards(folder)]
        if not self.shards:
            raise UserError("data.train names no folder of shards: set data.train=DIR (made by: w2vscale data shar)")
        self.durations = self._durations_of_a_shard()
        self.series_length = self._length_of_series()

    def describe(self) -> str:
        """Describe the data, to check that all ranks have the same and to log a change when a run resumes."""
        return f"{len(self.shards)} shards"

    def largest(self) -> MicroBatch:
        """Make a micro-batch of noise with the maximum size: as many of the longest utterances as fit."""
        maker, samples = self.assemble.maker, int(self.data.max_seconds * self.model.sampling_rate)
        rows = int(self.batch.max_seconds / self.data.max_seconds)
        noise = np.random.default_rng(0).standard_normal((rows, samples), dtype=np.float32)
        utterances = [Utterance(waveform, maker.largest_target(samples), place) for place, waveform in enumerate(noise)]
        inputs = maker.make_inputs(utterances, rng=lambda place: generator(0, Stream.MASK, 0, place))
        return MicroBatch(0, inputs, noise.size)

    def examples(self) -> Iterator[MicroBatch]:
        """Yields only the largest, because the sizes of the others are unknown."""
        yield self.largest()

    def windows(self, updates: range, *, micro_batches: int, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """The utterances depend on rank, world size and the update resumed from."""
        per_rank = micro_batches // world_size
        run = run_length(self.series_length, per_rank=per_rank)
        dataset = _Readers(self, updates.start, micro_batches, rank, world_size, run)
        loader = DataLoader(dataset, **loader_settings(self.data, per_rank=per_rank, per_item=run))
        return gather_windows(chain.from_iterable(loader), updates, per_rank=per_rank)

    def crop(self, cut: Cut, crops: np.random.Generator) -> Cut | None:
        """Crop `cut` to at most `data.max_seconds` at a random offset. Returns None if it is too short."""
        place, longest = crops.random(), self.data.max_seconds
        if cut.duration < self.shortest_seconds:
            return None
        if cut.duration <= longest:
            return cut
        return cut.truncate(offset=place * (cut.duration - longest), duration=longest, preserve_id=True)

    def bucket_bounds(self, run: int) -> list[float]:
        """Choose the upper bounds in seconds of duration buckets, for batches of `run` micro-batches.

        Each bucket has the same amount of audio of the first usable shard; the last one is for longer utterances.
        `data.stream_buffer` has room for a batch of every bucket, so one of them always has a full batch. Returns as
        many bounds as this allows, and an empty list if the buffer is too small for any.
        """
        for buckets in range(min(self.batch.buckets, self.durations.size), 0, -1):
            bounds = self._bounds(buckets)
            least = UTTERANCES_PER_BUCKET if buckets > 1 else 0
            if sum(max(least, rows) + (run - 1) * rows for rows in self.rows(bounds)) <= self.data.stream_buffer:
                return bounds
        return []

    def _bounds(self, buckets: int) -> list[float]:
        kept, shares = self.durations, np.arange(1, buckets + 1) / buckets
        places = np.searchsorted(np.cumsum(kept), shares * kept.sum()).clip(max=kept.size - 1)
        bounds: list[float] = np.unique([*kept[places], self.data.max_seconds]).tolist()
        return bounds

    def rows(self, bounds: list[float]) -> list[int]:
        """Return the number of utterances of a micro-batch, for each bucket."""
        return [int(self.batch.max_seconds / bound) for bound in bounds]

    def _length_of_series(self) -> int:
        """Return the length of a series: as in the plan, or a divisor of it if the buffer could fill too few buckets.

        Raises UserError if the buffer cannot fill a micro-batch.
        """
        alone = self.bucket_bounds(1)
        if not alone:
            raise UserError(
                f"data.stream_buffer={self.data.stream_buffer}: too few utterances to fill micro-batches of "
                f"batch.max_seconds={self.batch.max_seconds:g}; {sum(self.rows(self._bounds(1)))} are needed here"
            )
        length = length_of_series(self.batch)
        while len(self.bucket_bounds(length)) < min(len(alone), ENOUGH_BUCKETS):
            length = largest_divisor(length, at_most=length - 1)
        return length

    def _durations_of_a_shard(self) -> NDArray[np.float64]:
        """Return the cropped durations in seconds, ascending, of the usable utterances of the first shard with any."""
        problems = []
        for shard in self.shards:
            try:
                durations = np.array([cut.duration for cut in read_cuts(shard.cuts)])
            except NotACut as error:
                problems.append(str(error))
                continue
            except UserError:
                raise
            except Exception as error:  # damaged files raise many types of errors, as in read_shards
                problems.append(f"{shard.cuts}: cannot be read: {in_one_line(error)}")
                continue
            kept: NDArray[np.float64] = durations[durations >= self.shortest_seconds]
            if kept.size:
                return np.sort(np.minimum(kept, self.data.max_seconds))
            problems.append(f"{shard.cuts}: no utterance lasts {self.shortest_seconds:g} seconds (data.min_seconds)")
        raise UserError(f"{problems[0]}; the other {len(self.shards) - 1} shards have none either")


@dataclass(eq=False)
class _Readers(IterableDataset[list[MicroBatch]]):
    """The part of the stream for one rank; each loader process has its own `Reader`."""

    source: StreamedMicroBatches
    start: int
    micro_batches: int
    rank: int
    world_size: int
    run: int

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield every n-th run of micro-batches of this rank, where n is the number of loader processes.

        The DataLoader takes runs from its processes in turn, so together they yield all micro-batches in order.
        """
        worker = get_worker_info()
        here, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        place, readers = self.rank * workers + here, self.world_size * workers
        reader = Reader(self.source, self.start, place=place, readers=readers, run=self.run)
        for first, crops in zip(count(here * self.run, workers * self.run), reader.runs(), strict=False):
            yield [self.source.assemble(self._number(at), part) for at, part in enumerate(crops, start=first)]

    def _number(self, position: int) -> int:
        """Return the number of the micro-batch at `position` among those that this rank has run since the start."""
        update, step = divmod(position, self.micro_batches // self.world_size)
        return (self.start + update) * self.micro_batches + step * self.world_size + self.rank


@dataclass(eq=False)
class Reader:
    """Reader `place` of all `readers`. Iterating over it yields the utterances of its shards, without end.

    Its randomness is a function of (seed, update that the run started or resumed at, place).
    """

    source: StreamedMicroBatches
    start: int
    place: int
    readers: int
    run: int = 1  # number of consecutive micro-batches of one bucket
    lost: list[BadAudio] = field(default_factory=list)  # unreadable utterances since the last micro-batch

    def __iter__(self) -> Iterator[Cut]:
        return self.utterances()

    def runs(self) -> Iterator[list[list[Crop | BadAudio]]]:
        """Yield runs of micro-batches, without end. The first micro-batch also has the utterances lost meanwhile."""
        source, data = self.source, self.source.data
        bounds = source.bucket_bounds(self.run)
        # Each bucket has a fixed number of utterances, because Lhotse's batches by total duration could exceed
        # batch.max_seconds after padding.
        sizes = FixedBucketBatchSizeConstraint(
            max_seq_len_buckets=[*bounds[:-1], data.max_seconds + 1e-3],
            batch_sizes=[self.run * rows for rows in source.rows(bounds)],
        )
        sampler = DynamicBucketingSampler(
            CutSet(self),
            constraint=sizes,
            duration_bins=bounds[:-1],
            buffer_size=data.stream_buffer,
            shuffle=True,
            seed=derived_seed(source.seed, Stream.SHARDS, self.start, self.place) % 2**32,
            rank=0,
            world_size=1,
        )
        for cuts in sampler:
            crops = [Crop(cut, 0, round(cut.duration * source.model.sampling_rate)) for cut in cuts]
            ends = [len(crops) * place // self.run for place in range(self.run + 1)]
            parts: list[list[Crop | BadAudio]] = [[*crops[start:end]] for start, end in pairwise(ends)]
            parts[0] += self.lost
            self.lost.clear()
            yield parts

    def utterances(self, *, passes: int | None = None) -> Iterator[Cut]:
        """Yield usable utterances, cropped, in endless passes (or `passes`). Raises UserError if there are none."""
        shards, seed = self.source.shards, self.source.seed
        crops = generator(seed, Stream.CROP, self.start, self.place)
        # With fewer shards than readers, several readers share a shard and take its utterances in turn.
        turn, mine = divmod(self.place, len(shards))
        sharing = max(1, len(range(mine, self.readers, len(shards))))
        empty = 0
        for number in islice(count(), passes):
            order = generator(seed, Stream.SHARDS, self.start, number).permutation(len(shards))
            empty += 1
            for cut in islice(
                read_shards([shards[shard] for shard in order[mine :: self.readers]]), turn, None, sharing
            ):
                if isinstance(cut, BadAudio):
                    self.lost.append(cut)
                elif (cropped := self.source.crop(cut, crops)) is not None:
                    empty = 0
                    yield cropped
            if empty == EMPTY_PASSES and self.lost:
                lost = self.lost[-1]
                raise UserError(f"{lost.file}: {lost.reason}; this loader process could read none of its shards")
            if empty == EMPTY_PASSES:
                raise UserError(
                    f"loader process {self.place} of {self.readers} finds no utterance of data.min_seconds="
                    f"{self.source.data.min_seconds:g} in its part of {len(shards)} shards: make more shards, or set "
                    "data.workers lower"
                )
