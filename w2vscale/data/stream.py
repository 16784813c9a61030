"""Micro-batches from Lhotse Shar, for corpora that are too large to be indexed, or are not on a file system.

Shards are dealt to the loader processes of all ranks, anew in every pass; within each of them Lhotse's
DynamicBucketingSampler forms micro-batches. The stream never ends, so every rank makes as many updates as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.data.assembly import Assembler, Crop
from w2vscale.data.inputs import Utterance
from w2vscale.data.loading import gather_windows, loader_settings
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.errors import UserError
from w2vscale.models.feature_encoder import input_samples

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
    """An endless stream of micro-batches of the shards in `data.train`.

    Raises:
        UserError: a folder holds no shards, no shard holds a cut that is long enough, or the objective cannot learn
            from cropped utterances.
    """

    def __init__(self, assemble: Assembler, *, model: ModelConfig, data: DataConfig, batch: BatchConfig) -> None:
        if not assemble.maker.crops:
            raise UserError("data.mode=stream crops utterances, which this objective cannot use; set data.mode=index")
        self.assemble = assemble
        self.model, self.data, self.batch = model, data, batch
        self.seed = assemble.seed
        self.shortest_seconds = max(
            data.min_seconds, input_samples(assemble.maker.shortest_frames, model) / model.sampling_rate
        )
        self.shards = [shard for folder in data.train for shard in find_shards(folder)]
        if not self.shards:
            raise UserError("data.train names no folder of shards: set data.train=DIR (made by: w2vscale data shar)")
        self.bounds = self._duration_bounds()

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
        samples = int(self.data.max_seconds * self.model.sampling_rate)
        rows = int(self.batch.max_seconds / self.data.max_seconds)
        noise = np.random.default_rng(0).standard_normal((rows, samples), dtype=np.float32)
        utterances = [Utterance(waveform, None, place) for place, waveform in enumerate(noise)]
        inputs = self.assemble.maker.make_inputs(utterances, rng=lambda place: generator(0, Stream.MASK, 0, place))
        return MicroBatch(0, inputs, noise.size)

    def examples(self) -> Iterator[MicroBatch]:
        """See `TrainingData.examples`: only the largest, because the others are not known."""
        yield self.largest()

    def windows(self, updates: range, *, micro_batches: int, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """See `TrainingData.windows`. The content depends on rank, world size and where the run resumed."""
        dataset = _Readers(self, start=updates.start, micro_batches=micro_batches, rank=rank, world_size=world_size)
        per_rank = micro_batches // world_size
        return gather_windows(
            DataLoader(dataset, **loader_settings(self.data, per_rank=per_rank)), updates, per_rank=per_rank
        )

    def crop(self, cut: Cut, crops: np.random.Generator) -> Cut | None:
        """At most `data.max_seconds` of an utterance at a random offset; None if it is too short."""
        place = crops.random()
        if cut.duration < self.shortest_seconds:
            return None
        longest = self.data.max_seconds
        if cut.duration <= longest:
            return cut
        return cut.truncate(offset=place * (cut.duration - longest), duration=longest, preserve_id=True)

    def _duration_bounds(self) -> list[float]:
        """Where buckets begin (in seconds): each holds the same amount of audio of the first usable shard."""
        problem = ""
        for shard in self.shards:
            try:
                durations = np.array([cut.duration for cut in LazyManifestIterator(shard.cuts)])
            except Exception as error:  # as in _read
                problem = problem or f"{shard.cuts}: cannot be read: {' '.join(str(error).split())[:200]}"
                continue
            kept = np.sort(np.minimum(durations[durations >= self.shortest_seconds], self.data.max_seconds))
            if kept.size:
                break
            problem = (
                problem or f"{shard.cuts}: no utterance lasts {self.shortest_seconds:g} seconds (data.min_seconds)"
            )
        else:
            raise UserError(f"{problem}; the other {len(self.shards) - 1} shards have none either")
        buckets = max(1, min(self.batch.buckets, self.data.stream_buffer // UTTERANCES_PER_BUCKET, kept.size))
        shares = np.arange(1, buckets) / buckets
        bounds: NDArray[np.float64] = np.unique(kept[np.searchsorted(np.cumsum(kept), shares * kept.sum())])
        return bounds.tolist()


class _Readers(IterableDataset[MicroBatch]):
    """The part of the stream for one rank; each loader process reads shards of its own."""

    def __init__(
        self, source: StreamedMicroBatches, *, start: int, micro_batches: int, rank: int, world_size: int
    ) -> None:
        self.source = source
        self.start = start
        self.total = micro_batches
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[MicroBatch]:
        """Every n-th micro-batch of this rank, of n loader processes: the DataLoader asks them in turn."""
        worker = get_worker_info()
        here, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        reader = Reader(self.source, self.start, place=self.rank * workers + here, readers=self.world_size * workers)
        per_rank = self.total // self.world_size
        for position, crops in zip(count(here, workers), reader, strict=False):
            update, step = self.start + position // per_rank, position % per_rank
            number = update * self.total + step * self.world_size + self.rank
            yield self.source.assemble(number, crops)


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
        source, data = self.source, self.source.data
        rate = source.model.sampling_rate
        # A fixed size in each bucket, because batches by duration could exceed the budget.
        sizes = FixedBucketBatchSizeConstraint(
            max_seq_len_buckets=[*source.bounds, data.max_seconds + 1e-3],
            batch_sizes=[int(source.batch.max_seconds / longest) for longest in [*source.bounds, data.max_seconds]],
        )
        sampler = DynamicBucketingSampler(
            CutSet(_Endless(self)),
            constraint=sizes,
            duration_bins=source.bounds,
            buffer_size=data.stream_buffer,
            shuffle=True,
            seed=derived_seed(source.seed, Stream.SHARDS, self.start, self.place) % 2**32,
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
        shards, seed = self.source.shards, self.source.seed
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
                elif (cropped := self.source.crop(cut, crops)) is not None:
                    found = True
                    yield cropped
            empty = 0 if found else empty + 1
            if empty == EMPTY_PASSES and self.lost:
                raise UserError(
                    f"{self.lost[-1].file}: {self.lost[-1].reason}; its reader could not read its other shards either"
                )
            if empty == EMPTY_PASSES:
                raise UserError(
                    f"loader process {self.place} of {self.readers} finds no utterance of data.min_seconds="
                    f"{self.source.data.min_seconds:g} in its part of {len(shards)} shards: make more shards, or set "
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
