"""Micro-batches of indexed manifests, in the order of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from lhotse.cut import Cut
from torch.utils.data import Dataset

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.config.tree import MixConfig
from w2vscale.data.assembly import Assembler, InputMaker
from w2vscale.data.cuts import NotACut
from w2vscale.data.loading import Loader, gather_windows
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.mixing import draw_rates, groups
from w2vscale.data.plan import Mix, Plan, rank_window
from w2vscale.data.planned import PlannedMicroBatches, check_readable, plan_limits, without_long
from w2vscale.errors import UserError

VALIDATION_SEED = 20  # for order, crops, masks and negatives of validation, so that all runs validate on the same


class MicroBatches(PlannedMicroBatches, Dataset[MicroBatch]):
    """Micro-batches of an indexed corpus by their number in the plan."""

    corpus: Corpus
    plan: Plan

    def read(self, utterance: int) -> Cut | BadAudio:
        return _read(self.corpus, utterance)

    def padding(self) -> float:
        return self.plan.padding()

    def describe(self) -> str:
        return f"{super().describe()}, of manifests {self.corpus.fingerprint}"

    def sample(self, count: int) -> Iterator[Cut]:
        for utterance in np.linspace(0, len(self.corpus) - 1, count).astype(int).tolist():
            if not isinstance(cut := self.read(utterance), BadAudio):  # it will be left out, and listed
                yield cut

    def windows(
        self, updates: range, *, micro_batches: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[MicroBatch]]:
        numbers = (
            number
            for update in updates
            for number in rank_window(self.plan, update, micro_batches=micro_batches, rank=rank, world_size=world_size)
        )
        per_rank = micro_batches // world_size
        loader = Loader(self, self.data, numbers=numbers, per_rank=per_rank)
        return gather_windows(loader, updates, per_rank=per_rank)

    def one_epoch(self, *, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """Load one epoch, dealt to the ranks. All ranks have equally many micro-batches; the last may be empty."""
        total = self.plan.per_epoch
        numbers = range(rank, total, world_size)
        yield from Loader(self, self.data, numbers=numbers)
        for number in range(rank, world_size * -(-total // world_size), world_size)[len(numbers) :]:
            yield self.assemble(number, [])


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
    limits = plan_limits(maker, model=model, data=data, batch=batch)
    samples = without_long(corpus.samples(model.sampling_rate), maker, limits["max_samples"])
    mixed = None
    if mix is not None and mix.by != "nothing":
        group, names = groups(corpus, mix.by)
        trained_on = np.where(samples >= limits["min_samples"], np.minimum(samples, limits["max_samples"]), 0)
        mixed = Mix(group, draw_rates(group, names, trained_on, mix))
    try:
        return Plan(samples, seed=seed, pad_to_bucket=batch.pad_to == "bucket", mix=mixed, **limits)
    except UserError as error:
        raise UserError(f"{', '.join(str(manifest.path) for manifest in corpus.manifests)}: {error}") from None


def validation_set(
    corpus: Corpus, maker: InputMaker, *, model: ModelConfig, data: DataConfig, batch: BatchConfig
) -> MicroBatches:
    """Plan a corpus such that every run validates on the same micro-batches. Raises UserError like `make_plan`."""
    alone = batch.model_copy(update={"same_bucket": 1})  # no validation micro-batch shares its forward
    plan = make_plan(corpus, maker, model=model, data=data, batch=alone, seed=VALIDATION_SEED)
    return MicroBatches(corpus, plan, Assembler(maker, model, seed=VALIDATION_SEED), data)


def check_sample(corpus: Corpus, *, sampling_rate: int) -> None:
    """Read a few utterances spread over the corpus. Raises like `check_readable`."""
    path = corpus.manifests[0].path
    check_readable(
        partial(_read, corpus),
        len(corpus),
        sampling_rate=sampling_rate,
        name=str(path),
        advice=f"check the manifest with: w2vscale data validate {path}",
    )


def _read(corpus: Corpus, utterance: int) -> Cut | BadAudio:
    try:
        return corpus.cut(utterance)
    except NotACut as error:
        return BadAudio.of_line(utterance, error)
