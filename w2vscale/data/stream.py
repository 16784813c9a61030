"""Micro-batches of shards, in the order of a stream plan, read in sequence.

A loader process reads all utterances that it needs of a block at once, in the order in which they are stored, and drops
each when its micro-batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from lhotse.cut import Cut
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.data.assembly import Assembler
from w2vscale.data.loading import Loader, gather_windows
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.plan import run_length
from w2vscale.data.planned import PlannedMicroBatches, check_readable, plan_limits, without_long
from w2vscale.data.shard_index import ShardCorpus
from w2vscale.data.shards import StoredUtterance
from w2vscale.data.stream_plan import Share, StreamPlan
from w2vscale.errors import UserError


class StreamedMicroBatches(PlannedMicroBatches):
    """The micro-batches of indexed shards by their number in a stream plan."""

    corpus: ShardCorpus
    plan: StreamPlan

    def read(self, utterance: int) -> Cut | BadAudio:
        return self.corpus.cut(utterance)

    def padding(self) -> None:
        """Return None: it depends on the order in which the blocks of an epoch meet."""

    def describe(self) -> str:
        return f"{super().describe()}, of shards {self.corpus.fingerprint}"

    def sample(self, count: int) -> Iterator[Cut]:
        """Manifests are read whole, so the cuts are those of a few shards."""
        return islice(self._cuts_of_some(count), count)

    def _cuts_of_some(self, count: int) -> Iterator[Cut]:
        shards = len(self.corpus.shards)
        read = min(shards, -(-count * shards // len(self.corpus)))
        for shard in np.linspace(0, shards - 1, read).astype(int).tolist():
            for stored in self.corpus.read(np.arange(*self.corpus.starts[shard : shard + 2]), audio=False):
                if not isinstance(cut := stored.cut_without_audio(), BadAudio):
                    yield cut

    def windows(self, updates: range, *, micro_batches: int, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        assert micro_batches == self.plan.lanes * self.plan.series_length
        share = Share(updates, micro_batches, rank=rank, world_size=world_size)
        loader = Loader(_Loading(self, share), self.data, per_rank=share.per_rank)
        run = run_length(self.series_length, per_rank=share.per_rank)
        windows = gather_windows(loader, updates, per_rank=share.per_rank)
        return (longest_first(window, run) for window in windows)


def longest_first(window: list[MicroBatch], run: int) -> list[MicroBatch]:
    """Sort a window by length, in runs of `run` micro-batches, so that all ranks do similar work at the same time."""

    def longest(batches: list[MicroBatch]) -> int:
        return max(max(batch.inputs.audio.samples, default=0) for batch in batches)

    runs = [window[start : start + run] for start in range(0, len(window), run)]
    return [
        batch
        for each in sorted(runs, key=longest, reverse=True)
        for batch in sorted(each, key=lambda batch: longest([batch]), reverse=True)
    ]


@dataclass(eq=False)
class _Loading(IterableDataset[MicroBatch]):
    """The micro-batches of one rank; each loader process makes its share of them.

    The DataLoader takes them from its processes in turn, so together they yield all of them in order.
    """

    source: StreamedMicroBatches
    share: Share

    def __iter__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        share = replace(self.share, process=worker.id, processes=worker.num_workers) if worker else self.share
        return iter(Reader(self.source, share))


@dataclass
class Reader:
    """Makes the micro-batches of a share, in order."""

    source: StreamedMicroBatches
    share: Share
    held: dict[int, list[StoredUtterance]] = field(default_factory=dict)
    """The utterances that have been read, by micro-batch."""

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in self.share:
            if number not in self.held:
                self._read(self.share.among(self.source.plan.together(number)))
            cuts = [stored.cut() for stored in self.held.pop(number)]
            yield self.source.make(self.source.plan.micro_batch(number), cuts)

    def _read(self, numbers: NDArray[np.int64]) -> None:
        """Read the utterances of micro-batches in the order in which they are stored."""
        planned = [self.source.plan.micro_batch(number).utterances for number in numbers.tolist()]
        utterances = np.sort(np.concatenate(planned))
        stored = dict(zip(utterances.tolist(), self.source.corpus.read(utterances), strict=True))
        for number, members in zip(numbers.tolist(), planned, strict=True):
            self.held[number] = [stored[utterance] for utterance in members.tolist()]


def open_stream(
    assemble: Assembler, *, model: ModelConfig, data: DataConfig, batch: BatchConfig
) -> StreamedMicroBatches:
    """Open the shards in `data.train`.

    Raises UserError if a folder has no index or has changed since it was indexed, no utterance is long enough or can be
    read, or crops are too short for the objective or too long for the model.
    """
    corpus = ShardCorpus(data.train)
    check_readable(
        corpus.cut,
        len(corpus),
        sampling_rate=model.sampling_rate,
        name=corpus.name,
        advice="write the shards again with: w2vscale data shar",
    )
    limits = plan_limits(assemble.maker, model=model, data=data, batch=batch)
    samples = without_long(corpus.samples(model.sampling_rate), assemble.maker, limits["max_samples"])
    try:
        plan = StreamPlan(
            samples,
            corpus.starts,
            block_size=data.stream_buffer,
            micro_batches=batch.micro_batches,
            seed=assemble.seed,
            **limits,
        )
    except UserError as error:
        raise UserError(f"{corpus.name}: {error}") from None
    return StreamedMicroBatches(corpus, plan, assemble, data)
