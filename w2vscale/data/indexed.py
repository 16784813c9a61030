"""Micro-batches of indexed manifests, in the order of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from torch.utils.data import DataLoader, Dataset

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.config.tree import MixConfig
from w2vscale.data.assembly import Assembler, Crop, InputMaker
from w2vscale.data.audio import BLOCK_SECONDS, AudioError, read_audio
from w2vscale.data.cuts import NotACut
from w2vscale.data.loading import gather_windows, loader_settings
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.mixing import draw_rates, groups
from w2vscale.data.plan import Mix, Plan, length_of_series, rank_window
from w2vscale.errors import UserError
from w2vscale.models.lengths import input_samples, output_frames

VALIDATION_SEED = 20  # for order, crops, masks and negatives of validation, so that all runs validate on the same


class MicroBatches(Dataset[MicroBatch]):
    """Micro-batches of an indexed corpus by their number in the plan."""

    def __init__(self, corpus: Corpus, plan: Plan, assemble: Assembler, data: DataConfig) -> None:
        self.corpus = corpus
        self.plan = plan
        self.assemble = assemble
        self.data = data
        self.utterances, self.micro_batches = len(plan), plan.per_epoch
        self.series_length = plan.series_length

    def __getitem__(self, number: int) -> MicroBatch:
        planned = self.plan.micro_batch(number)
        spans = zip(planned.utterances.tolist(), planned.offsets.tolist(), planned.lengths.tolist(), strict=True)
        return self.assemble(number, [self._crop(*span) for span in spans], width=planned.width)

    def _crop(self, utterance: int, offset: int, length: int) -> Crop | BadAudio:
        try:
            return Crop(self.corpus.cut(utterance), offset, length)
        except NotACut as error:
            return BadAudio.of_line(utterance, error)

    def describe(self) -> str:
        """Describe the data, to check that all ranks have the same and to log a change when a run resumes."""
        hours = self.corpus.durations.sum() / 3600
        return f"{hours:.1f} hours, {self.utterances} utterances, of manifests {self.corpus.fingerprint}"

    def largest(self) -> MicroBatch:
        """Load the micro-batch of epoch 0 with the most padded samples."""
        return self[self.plan.largest()]

    def examples(self) -> Iterator[MicroBatch]:
        """Load the micro-batches of epoch 0 with the most padded samples and with the longest utterances."""
        return (self[number] for number in dict.fromkeys([self.plan.largest(), self.plan.longest()]))

    def windows(
        self, updates: range, *, micro_batches: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[MicroBatch]]:
        numbers = (
            number
            for update in updates
            for number in rank_window(self.plan, update, micro_batches=micro_batches, rank=rank, world_size=world_size)
        )
        per_rank = micro_batches // world_size
        return gather_windows(self._loader(numbers, per_rank=per_rank), updates, per_rank=per_rank)

    def one_epoch(self, *, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """Load one epoch, dealt to the ranks. All ranks have equally many micro-batches; the last may be empty."""
        total = self.plan.per_epoch
        numbers = range(rank, total, world_size)
        yield from self._loader(numbers)
        for number in range(rank, world_size * -(-total // world_size), world_size)[len(numbers) :]:
            yield self.assemble(number, [])

    def _loader(self, numbers: Iterable[int], *, per_rank: int = 1) -> DataLoader[MicroBatch]:
        return DataLoader(self, sampler=numbers, **loader_settings(self.data, per_rank=per_rank))


def make_plan(
    corpus: Corpus,
    maker: InputMaker,
    *,
    model: ModelConfig,
    data: DataConfig,
    batch: BatchConfig,
    seed: int,
    mix: MixConfig | None = None,
) -> Plan:
    """Plan the micro-batches of a corpus, balanced by `mix` if it is given.

    Raises UserError if crops are too short for the objective or too long for the model, or no utterance is long enough.
    """
    rate = model.sampling_rate
    max_samples, shortest = int(data.max_seconds * rate), input_samples(maker.shortest_frames, model)
    if max_samples < shortest:
        raise UserError(
            f"data.max_seconds={data.max_seconds:g}: shorter than {maker.shortest_frames} frames, the least that can "
            f"be learned from; set at least {math.ceil(1000 * shortest / rate) / 1000:g}"
        )
    frames = output_frames(max_samples, model)
    if model.max_frames is not None and frames > model.max_frames:
        raise UserError(
            f"data.max_seconds={data.max_seconds:g}: gives {frames} frames, "
            f"and the model takes at most model.max_frames={model.max_frames}"
        )
    samples = corpus.samples(rate)
    if not maker.crops:
        samples = np.where(samples > max_samples, 0, samples)
    min_samples = max(int(data.min_seconds * rate), shortest)
    mixed = None
    if mix is not None and mix.by != "nothing":
        group, names = groups(corpus, mix.by)
        trained_on = np.where(samples >= min_samples, np.minimum(samples, max_samples), 0)
        mixed = Mix(group, draw_rates(group, names, trained_on, mix))
    try:
        return Plan(
            samples,
            max_samples=max_samples,
            min_samples=min_samples,
            budget_samples=int(batch.max_seconds * rate),
            buckets=batch.buckets,
            seed=seed,
            series_length=length_of_series(batch),
            pad_to_bucket=batch.pad_to == "bucket",
            mix=mixed,
        )
    except UserError as error:
        raise UserError(f"{', '.join(str(manifest.path) for manifest in corpus.manifests)}: {error}") from None


def validation_set(
    corpus: Corpus, maker: InputMaker, *, model: ModelConfig, data: DataConfig, batch: BatchConfig
) -> MicroBatches:
    """Plan a corpus such that every run validates on the same micro-batches. Raises UserError like `make_plan`."""
    alone = batch.model_copy(update={"same_bucket": 1})  # no validation micro-batch shares its forward
    plan = make_plan(corpus, maker, model=model, data=data, batch=alone, seed=VALIDATION_SEED)
    return MicroBatches(corpus, plan, Assembler(maker, model, seed=VALIDATION_SEED), data)


def check_sample(corpus: Corpus, *, sampling_rate: int, count: int = 8) -> None:
    """Read a few utterances spread over the corpus.

    Raises UserError if none of them can be read, or the audio of one is not in files.
    """
    bounds = np.linspace(0, len(corpus), min(count, len(corpus)) + 1).astype(int)
    reasons = []
    for start, _ in pairwise(bounds):
        try:
            cut = corpus.cut(int(start))
            samples = round(min(cut.duration, BLOCK_SECONDS) * sampling_rate)
            read_audio(cut, sampling_rate=sampling_rate, length=samples)
            return
        except AudioError as error:
            reasons.append(str(BadAudio.of(cut, error)))
        except NotACut as error:
            reasons.append(str(error))
    raise UserError(
        f"{corpus.manifests[0].path}: none of {len(reasons)} sampled utterances can be read; the first: {reasons[0]}; "
        f"check the manifest with: w2vscale data validate {corpus.manifests[0].path}"
    )
