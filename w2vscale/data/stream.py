"""Micro-batches from Lhotse Shar, for corpora that are too large to be indexed, or are not on a file system.

Shards are dealt to the loader processes of all ranks, anew in every pass; within each of them Lhotse's
DynamicBucketingSampler forms micro-batches. The stream never ends, so every rank makes as many updates as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint
from lhotse.lazy import LazyManifestIterator
from lhotse.shar.readers.lazy import LazySharIterator
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from w2vscale.config import Config
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.loading import Assembler, Crop, gather_windows, loader_settings
from w2vscale.data.micro_batch import BadAudio, MicroBatch, make_inputs, shortest_samples
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.errors import UserError

UTTERANCES_PER_BUCKET = 50
"""Of those that a loader process holds: in smaller buckets few would have company of their length."""

EMPTY_PASSES = 10
"""A reader that found nothing in so many passes never will."""


@dataclass(frozen=True)
class Shard:
    """One Shar shard: a manifest of cuts, and a tar archive of their audio."""

    cuts: Path
    recording: Path


class StreamedMicroBatches:
    """An endless stream of micro-batches of the shards in some folders.

    Raises:
        UserError: a folder holds no shards, or no shard holds a cut that is long enough.
    """

    def __init__(self, folders: Sequence[Path], config: Config, *, augmentation: Augmentation | None = None) -> None:
        self.config = config
        self.shards = [shard for folder in folders for shard in find_shards(folder)]
        if not self.shards:
            raise UserError("data.train names no folder of shards: set data.train=DIR (made by: w2vscale data shar)")
        self.assemble = Assembler(config, seed=config.trainer.seed, augmentation=augmentation)
        self.bounds = _duration_bounds(self.shards, config)

    @property
    def utterances(self) -> None:
        """Not known without reading all shards."""

    @property
    def micro_batches(self) -> None:
        """Not known without reading all shards."""

    def describe(self) -> str:
        """What all ranks must agree on."""
        return f"{len(self.shards)} shards"

    def largest(self) -> MicroBatch:
        """One of noise, with as many of the longest utterances as a micro-batch can have."""
        config, rate = self.config, self.config.model.sampling_rate
        samples = int(config.data.max_seconds * rate)
        rows = int(config.batch.max_seconds / config.data.max_seconds)
        noise = np.random.default_rng(0).standard_normal((rows, samples), dtype=np.float32)
        inputs = make_inputs(list(noise), range(rows), number=0, seed=0, config=config.model)
        return MicroBatch(0, 0, inputs, noise.size)

    def examples(self) -> Iterator[MicroBatch]:
        """See `TrainingData.examples`: the largest alone, since the others are not known."""
        yield self.largest()

    def windows(self, updates: range, *, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """For each update its window. What it holds depends on the rank, their number, and where the run resumed."""
        dataset = _Readers(self, start=updates.start, rank=rank, world_size=world_size)
        per_rank = self.config.batch.micro_batches // world_size
        loader = DataLoader(dataset, **loader_settings(self.config, per_rank=per_rank))
        return gather_windows(loader, updates, per_rank=per_rank)


class _Readers(IterableDataset[MicroBatch]):
    """One rank's part of the stream; each loader process reads shards of its own."""

    def __init__(self, source: StreamedMicroBatches, *, start: int, rank: int, world_size: int) -> None:
        self.source = source
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[MicroBatch]:
        """Every n-th micro-batch of this rank, of n loader processes: the DataLoader asks them in turn."""
        worker = get_worker_info()
        here, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        reader = Reader(self.source, self.start, place=self.rank * workers + here, readers=self.world_size * workers)
        per_rank = self.source.config.batch.micro_batches // self.world_size
        for position, crops in zip(count(here, workers), reader, strict=False):
            update, step = self.start + position // per_rank, position % per_rank
            number = update * self.source.config.batch.micro_batches + step * self.world_size + self.rank
            yield self.source.assemble(update, number, crops)


class Reader:
    """Reader `place` of all `readers`: endless lists of crops that fit into a micro-batch, and of what shards lost.

    Its randomness follows from (seed, the update that the run started or resumed at, place).
    """

    def __init__(self, source: StreamedMicroBatches, start: int, *, place: int, readers: int) -> None:
        self.source = source
        self.start = start
        self.place = place
        self.readers = readers
        self.lost: list[BadAudio] = []
        """Utterances that could not be read from their shards since the last micro-batch."""

    def __iter__(self) -> Iterator[list[Crop | BadAudio]]:
        config = self.source.config
        seed = config.trainer.seed
        rate = config.model.sampling_rate
        # Of a fixed size in each bucket, since by their duration Lhotse would let some exceed the budget.
        sizes = FixedBucketBatchSizeConstraint(
            max_seq_len_buckets=[*self.source.bounds, config.data.max_seconds + 1e-3],
            batch_sizes=[
                int(config.batch.max_seconds / longest) for longest in [*self.source.bounds, config.data.max_seconds]
            ],
        )
        sampler = DynamicBucketingSampler(
            CutSet(_Endless(self)),
            constraint=sizes,
            duration_bins=self.source.bounds,
            buffer_size=config.data.stream_buffer,
            shuffle=True,
            seed=derived_seed(seed, Stream.SHARDS, self.start, self.place) % 2**32,
            rank=0,
            world_size=1,
        )
        for cuts in sampler:
            yield [*(Crop(cut, 0, round(cut.duration * rate)) for cut in cuts), *self.lost]
            self.lost.clear()

    def utterances(self, *, passes: int | None = None) -> Iterator[Cut]:
        """This reader's utterances that are long enough, cropped, pass after pass (or `passes`) over all shards.

        Raises:
            UserError: it has none.
        """
        config, shards = self.source.config, self.source.shards
        seed = config.trainer.seed
        crops = generator(seed, Stream.CROP, self.start, self.place)
        # Where there are fewer shards than readers, some read the same one, and take its utterances in turn.
        sharing = max(1, len(range(self.place % len(shards), self.readers, len(shards))))
        turn = self.place // len(shards)
        empty = 0
        for number in count() if passes is None else range(passes):
            order = generator(seed, Stream.SHARDS, self.start, number).permutation(len(shards))
            mine = order[self.place % len(shards) :: self.readers]
            found = False
            for position, cut in enumerate(_read([shards[shard] for shard in mine])):
                if position % sharing != turn:
                    continue
                if isinstance(cut, BadAudio):
                    self.lost.append(cut)
                elif (cropped := _crop(cut, config, crops)) is not None:
                    found = True
                    yield cropped
            empty = 0 if found else empty + 1
            if empty == EMPTY_PASSES and self.lost:
                raise UserError(f"{self.lost[-1].file}: {self.lost[-1].reason}; nor can the other shards of its reader")
            if empty == EMPTY_PASSES:
                raise UserError(
                    f"loader process {self.place} of {self.readers} finds no utterance of data.min_seconds="
                    f"{config.data.min_seconds:g} in its part of {len(shards)} shards: make more shards, or set "
                    "data.workers lower"
                )


class _Endless:
    """A reader's utterances in the form that Lhotse takes."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Cut]:
        return self.reader.utterances()


def find_shards(folder: Path) -> list[Shard]:
    """The shards of a folder, by number.

    Raises:
        UserError: the folder does not exist, holds none, or misses a part of one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards; make one with: w2vscale data shar CUTS.jsonl {folder}")
    manifests = sorted(folder.glob("cuts.*.jsonl*"))
    if not manifests:
        raise UserError(f"{folder}: holds no shards (cuts.*.jsonl.gz); make some with: w2vscale data shar")
    shards = []
    for cuts in manifests:
        recording = folder / f"recording.{cuts.name.split('.')[1]}.tar"
        if not recording.is_file():
            raise UserError(f"{cuts}: its audio is missing: no {recording.name} beside it")
        shards.append(Shard(cuts, recording))
    return shards


def _read(shards: Iterable[Shard]) -> Iterator[Cut | BadAudio]:
    """Cuts with their audio, as it is encoded; where a shard is damaged, the utterances that are lost."""
    for shard in shards:
        fields: dict[str, Any] = {"cuts": [shard.cuts], "recording": [shard.recording]}
        read = 0
        try:
            for cut in LazySharIterator(fields):
                read += 1
                yield cut
        except Exception as error:  # whatever damaged gzip, JSON, tar or audio makes their libraries raise
            yield from _lost(shard, read, error)


def _lost(shard: Shard, read: int, error: Exception) -> list[BadAudio]:
    """The utterances of a damaged shard after the first `read`, or the shard itself if they cannot be listed."""
    reason = "its shard cannot be read: " + (" ".join(str(error).split())[:200] or type(error).__name__)
    try:
        names = [cut.id for cut in islice(LazyManifestIterator(shard.cuts), read, None)]
    except Exception:
        return [BadAudio(shard.cuts.name, str(shard.cuts), "undecodable", reason)]
    return [BadAudio(name, str(shard.recording), "undecodable", reason) for name in names]


def _crop(cut: Cut, config: Config, crops: np.random.Generator) -> Cut | None:
    """At most `data.max_seconds` at a random offset; None if it is too short."""
    place = crops.random()
    if cut.duration < _shortest_seconds(config):
        return None
    if cut.duration <= config.data.max_seconds:
        return cut
    offset = place * (cut.duration - config.data.max_seconds)
    return cut.truncate(offset=offset, duration=config.data.max_seconds, preserve_id=True)


def _shortest_seconds(config: Config) -> float:
    return max(config.data.min_seconds, shortest_samples(config.model) / config.model.sampling_rate)


def _duration_bounds(shards: Sequence[Shard], config: Config) -> list[float]:
    """Where buckets begin (in seconds): each holds as much audio of the first usable shard as any other."""
    problem = ""
    for shard in shards:
        try:
            durations = np.array([cut.duration for cut in LazyManifestIterator(shard.cuts)])
        except Exception as error:  # as in _read
            problem = problem or f"{shard.cuts}: cannot be read: {' '.join(str(error).split())[:200]}"
            continue
        kept = np.sort(np.minimum(durations[durations >= _shortest_seconds(config)], config.data.max_seconds))
        if kept.size:
            break
        problem = (
            problem or f"{shard.cuts}: no utterance lasts {_shortest_seconds(config):g} seconds (data.min_seconds)"
        )
    else:
        raise UserError(f"{problem}; nor is there one in any other of {len(shards)} shards")
    buckets = max(1, min(config.batch.buckets, config.data.stream_buffer // UTTERANCES_PER_BUCKET, kept.size))
    shares = np.arange(1, buckets) / buckets
    bounds: NDArray[np.float64] = np.unique(kept[np.searchsorted(np.cumsum(kept), shares * kept.sum())])
    return bounds.tolist()
