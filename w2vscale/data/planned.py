"""Micro-batches in the order of a plan, and the limits of a plan: the same for indexed manifests and for shards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from lhotse.cut import Cut
from numpy.typing import NDArray

from w2vscale.config import BatchConfig, DataConfig, ModelConfig
from w2vscale.data.assembly import Assembler, Crop, InputMaker
from w2vscale.data.audio import BLOCK_SECONDS, AudioError, read_audio
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.plan import PlannedMicroBatch, length_of_series
from w2vscale.errors import UserError
from w2vscale.models.lengths import input_samples, output_frames


class AnyPlan(Protocol):
    """What micro-batches need of a plan."""

    per_epoch: int
    series_length: int
    left_out: int

    def __len__(self) -> int:
        """Number of utterances per epoch."""

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """Return micro-batch `number`."""

    def largest(self) -> int:
        """Return the number of the micro-batch of epoch 0 with the most padded samples."""

    def longest(self) -> int:
        """Return the number of the largest micro-batch of epoch 0 with the longest utterances."""


class AnyCorpus(Protocol):
    """What micro-batches need of a corpus."""

    not_found: int  # utterances that its index does not have

    @property
    def durations(self) -> NDArray[np.float64]:
        """Duration of each utterance in seconds."""

    def __len__(self) -> int:
        """Number of utterances."""


class PlannedMicroBatches(ABC):
    """Micro-batches of a corpus by their number in a plan."""

    def __init__(self, corpus: AnyCorpus, plan: AnyPlan, assemble: Assembler, data: DataConfig) -> None:
        self.corpus = corpus
        self.plan = plan
        self.assemble = assemble
        self.data = data
        self.utterances, self.micro_batches = len(plan), plan.per_epoch
        self.series_length = plan.series_length
        self.utterances_in_all, self.left_out, self.not_found = len(corpus), plan.left_out, corpus.not_found

    @abstractmethod
    def read(self, utterance: int) -> Cut | BadAudio:
        """Read a cut of the corpus, or say why it cannot be read."""

    @abstractmethod
    def sample(self, count: int) -> Iterator[Cut]:
        """Yield about `count` cuts that are spread over the corpus, without those that cannot be read."""

    def __getitem__(self, number: int) -> MicroBatch:
        planned = self.plan.micro_batch(number)
        return self.make(planned, [self.read(utterance) for utterance in planned.utterances.tolist()])

    def make(self, planned: PlannedMicroBatch, cuts: list[Cut | BadAudio]) -> MicroBatch:
        """Make a micro-batch of its cuts."""
        spans = zip(cuts, planned.offsets.tolist(), planned.lengths.tolist(), strict=True)
        crops = [cut if isinstance(cut, BadAudio) else Crop(cut, offset, length) for cut, offset, length in spans]
        return self.assemble(planned.number, crops, width=planned.width)

    @property
    def hours(self) -> float:
        """Hours of audio in one epoch, unless a mix changes how often utterances are drawn."""
        durations = self.corpus.durations
        durations = durations[durations >= self.data.min_seconds]
        return float(np.minimum(durations, self.data.max_seconds).sum()) / 3600

    def describe(self) -> str:
        """Describe the data, to check that all ranks have the same and to log a change when a run resumes."""
        return f"{self.corpus.durations.sum() / 3600:.1f} hours, {self.utterances} utterances"

    def largest(self) -> MicroBatch:
        """Load the micro-batch of epoch 0 with the most padded samples."""
        return self[self.plan.largest()]

    def examples(self) -> Iterator[MicroBatch]:
        """Load the micro-batches of epoch 0 with the most padded samples and with the longest utterances."""
        return (self[number] for number in dict.fromkeys([self.plan.largest(), self.plan.longest()]))


def check_readable(
    read: Callable[[int], Cut | BadAudio], total: int, *, sampling_rate: int, name: str, advice: str, count: int = 8
) -> None:
    """Read a few of the `total` utterances of the corpus that `name` names.

    Raises UserError, with `advice`, if none of them can be read, or the audio of one is not where it should be.
    """
    bounds = np.linspace(0, total, min(count, total) + 1).astype(int)
    reasons = []
    for start, _ in pairwise(bounds.tolist()):
        cut = read(start)
        if isinstance(cut, BadAudio):
            reasons.append(str(cut))
            continue
        try:
            samples = round(min(cut.duration, BLOCK_SECONDS) * sampling_rate)
            read_audio(cut, sampling_rate=sampling_rate, length=samples)
            return
        except AudioError as error:
            reasons.append(str(BadAudio.of(cut, error)))
    raise UserError(f"{name}: none of {len(reasons)} sampled utterances can be read; the first: {reasons[0]}; {advice}")


def plan_limits(maker: InputMaker, *, model: ModelConfig, data: DataConfig, batch: BatchConfig) -> dict[str, Any]:
    """Return the arguments of a plan that say what fits into a micro-batch.

    Raises UserError if crops are too short for the objective or too long for the model.
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
    return {
        "max_samples": max_samples,
        "min_samples": max(int(data.min_seconds * rate), shortest),
        "budget_samples": int(batch.max_seconds * rate),
        "buckets": batch.buckets,
        "series_length": length_of_series(batch),
    }


def without_long(samples: NDArray[np.int64], maker: InputMaker, max_samples: int) -> NDArray[np.int64]:
    """Give utterances that would have to be cropped the length 0, if the objective needs whole utterances."""
    return samples if maker.crops else np.where(samples > max_samples, 0, samples)
