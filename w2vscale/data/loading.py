"""Planned micro-batches with their audio, and the DataLoader around them."""

from __future__ import annotations

import gc
import math
import multiprocessing
import multiprocessing.process
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from w2vscale.config import Config
from w2vscale.config.tree import MixConfig
from w2vscale.data.audio import BLOCK_SECONDS, AudioError, read_audio, standardize
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.inputs import CtcInputs, PretrainingInputs
from w2vscale.data.manifest import Corpus, audio_path
from w2vscale.data.micro_batch import BadAudio, MicroBatch, make_inputs, shortest_samples
from w2vscale.data.mixing import draw_rates, groups
from w2vscale.data.plan import Mix, Plan, window_numbers
from w2vscale.data.transcripts import UNKNOWN, Transcripts, make_ctc_inputs, refuse_too_many, transcript
from w2vscale.errors import UserError
from w2vscale.models.lengths import output_frames

VALIDATION_SEED = 20
"""Validation draws its order, crops, masks and negatives from this, so that all runs validate on the same."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop."""

THRESHOLDS = gc.get_threshold()
"""When Python collects garbage, before anything changes that."""


class Crop(NamedTuple):
    """A part of an utterance: `length` samples from sample `offset`."""

    cut: Cut
    offset: int
    length: int


class Assembler:
    """Reads the audio of a micro-batch, and draws all that is drawn for it. A pure function of its arguments."""

    def __init__(self, config: Config, *, seed: int, augmentation: Augmentation | None = None) -> None:
        self.config = config
        self.model = config.model
        self.seed = seed
        self.augmentation = augmentation
        self.transcripts = (
            Transcripts(config.ctc.vocabulary, config.ctc.sentencepiece) if config.ctc.vocabulary else None
        )

    def __call__(self, update: int, number: int, crops: Sequence[Crop | BadAudio], *, width: int = 0) -> MicroBatch:
        """Micro-batch `number` of `crops`, at least `width` samples wide; those that are unusable are left out."""
        waveforms: list[NDArray[np.float32]] = []
        labels: list[list[int]] = []
        places: list[int] = []
        bad: list[BadAudio] = []
        for place, crop in enumerate(crops):
            if isinstance(crop, BadAudio):
                bad.append(crop)
                continue
            try:
                spelled, unknown = self._labels(crop)
                audio = read_audio(
                    crop.cut,
                    sampling_rate=self.model.sampling_rate,
                    offset=crop.offset,
                    length=crop.length,
                    normalize=self.model.normalize_waveform,
                )
            except AudioError as error:
                bad.append(BadAudio(crop.cut.id, audio_path(crop.cut), error.kind, str(error)))
                continue
            bad += unknown
            if self.augmentation is not None:
                changed, unusable = self.augmentation(audio, number=number, place=place)
                bad += unusable
                audio = standardize(changed) if self.model.normalize_waveform and changed is not audio else changed
            waveforms.append(audio)
            labels.append(spelled)
            places.append(place)
        draws: Any = {"number": number, "seed": self.seed, "width": width}
        inputs: PretrainingInputs | CtcInputs
        if self.transcripts is not None:
            inputs = make_ctc_inputs(waveforms, labels, places, config=self.config, **draws)
        else:
            inputs = make_inputs(waveforms, places, config=self.model, **draws)
        samples = sum(waveform.size for waveform in waveforms)
        return MicroBatch(update, number, inputs, samples, tuple(bad))

    def _labels(self, crop: Crop) -> tuple[list[int], list[BadAudio]]:
        """An utterance's labels, none in pretraining, and a note of what the vocabulary does not have."""
        if self.transcripts is None:
            return [], []
        labels, unknown = self.transcripts.labels(transcript(crop.cut))
        refuse_too_many(labels, output_frames(crop.length, self.model))
        if not unknown:
            return labels, []
        reason = f"its transcript has {unknown!r}, not in ctc.vocabulary, taken for {UNKNOWN}"
        return labels, [BadAudio(crop.cut.id, audio_path(crop.cut), "unknown symbols", reason, left_out=False)]


FALLING = 0.8
"""Between two examples, the share of the length."""


class TrainingData(Protocol):
    """What a run trains on."""

    @property
    def utterances(self) -> int | None:
        """In one epoch; None if that is not known."""

    @property
    def micro_batches(self) -> int | None:
        """In one epoch; None if that is not known."""

    def describe(self) -> str:
        """What all ranks must agree on."""

    def largest(self) -> MicroBatch:
        """One that needs as much memory as any."""

    def examples(self) -> Iterator[MicroBatch]:
        """Micro-batches of falling length, each as large as those of its length are."""

    def windows(self, updates: range, *, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """For each update its window: the micro-batches that this rank runs, loaded ahead by worker processes."""


class MicroBatches(Dataset[MicroBatch]):
    """Micro-batches of an indexed corpus by (update, number), in the order of its plan."""

    def __init__(
        self, corpus: Corpus, plan: Plan, config: Config, *, seed: int, augmentation: Augmentation | None = None
    ) -> None:
        self.corpus = corpus
        self.plan = plan
        self.config = config
        self.seed = seed
        self.assemble = Assembler(config, seed=seed, augmentation=augmentation)

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch:
        update, number = key
        planned = self.plan.micro_batch(number)
        spans = zip(planned.utterances.tolist(), planned.offsets.tolist(), planned.lengths.tolist(), strict=True)
        crops = [self._crop(*span) for span in spans]
        return self.assemble(update, number, crops, width=planned.width)

    def _crop(self, utterance: int, offset: int, length: int) -> Crop | BadAudio:
        try:
            return Crop(self.corpus.cut(utterance), offset, length)
        except UserError as error:  # the manifest was changed under the run
            return BadAudio(f"number {utterance}", "", "mismatched", str(error))

    @property
    def utterances(self) -> int:
        """In one epoch."""
        return len(self.plan)

    @property
    def micro_batches(self) -> int:
        """In one epoch."""
        return self.plan.per_epoch

    def describe(self) -> str:
        """What all ranks must agree on."""
        return (
            f"{self.corpus.hours:.1f} hours, {self.utterances} utterances and {self.micro_batches} micro-batches an "
            f"epoch, of manifests {self.corpus.fingerprint}"
        )

    def largest(self) -> MicroBatch:
        """The first of epoch 0 with the most padded samples."""
        return self[0, self.plan.largest()]

    def examples(self) -> Iterator[MicroBatch]:
        """See `TrainingData.examples`: of epoch 0."""
        return (self[0, number] for number in self.plan.largest_of_buckets(FALLING))

    def windows(self, updates: range, *, rank: int = 0, world_size: int = 1) -> Iterator[list[MicroBatch]]:
        """For each update its window: the micro-batches that this rank runs, loaded ahead by worker processes."""
        total = self.config.batch.micro_batches
        keys = window_numbers(self.plan, updates=updates, micro_batches=total, rank=rank, world_size=world_size)
        per_rank = total // world_size
        return gather_windows(_loader(self, keys, self.config, per_rank=per_rank), updates, per_rank=per_rank)


def gather_windows(loader: Iterable[MicroBatch], updates: range, *, per_rank: int) -> Iterator[list[MicroBatch]]:
    """A rank's stream of micro-batches, update by update."""
    stream = iter(loader)
    for _ in updates:
        yield [next(stream) for _ in range(per_rank)]


class _Sequence(Sampler[tuple[int, int]]):
    """Hands the DataLoader the keys of one rank, in order."""

    def __init__(self, keys: Iterator[tuple[int, int]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.keys


def make_plan(corpus: Corpus, config: Config, *, seed: int, mix: MixConfig | None = None) -> Plan:
    """The plan of a corpus under a run's settings; with `mix`, balanced by it.

    Raises:
        UserError: crops are too short to be masked or too long for the model, or no utterance is long enough.
    """
    rate = config.model.sampling_rate
    max_samples, shortest = int(config.data.max_seconds * rate), shortest_samples(config.model)
    if max_samples < shortest:
        raise UserError(
            f"data.max_seconds={config.data.max_seconds:g}: too short to be masked; "
            f"set at least {math.ceil(1000 * shortest / rate) / 1000:g}"
        )
    frames, limit = output_frames(max_samples, config.model), config.model.max_frames
    if limit is not None and frames > limit:
        raise UserError(
            f"data.max_seconds={config.data.max_seconds:g}: gives {frames} frames, "
            f"and the model takes at most model.max_frames={limit}"
        )
    samples = corpus.samples(rate)
    if config.ctc.vocabulary:  # a crop of an utterance would not be what its transcript says
        samples = np.where(samples > max_samples, 0, samples)
    min_samples = max(int(config.data.min_seconds * rate), shortest)
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
            budget_samples=int(config.batch.max_seconds * rate),
            buckets=config.batch.buckets,
            seed=seed,
            pad_to_bucket=config.batch.pad_to == "bucket",
            mix=mixed,
        )
    except UserError as error:
        raise UserError(f"{', '.join(str(manifest.path) for manifest in corpus.manifests)}: {error}") from None


def validation_batches(
    dataset: MicroBatches, config: Config, *, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """One pass over a corpus, dealt to the ranks; all have equally many, the last may be empty ones."""
    total = dataset.plan.per_epoch
    rounds = -(-total // world_size)
    numbers = [rank + world_size * i for i in range(rounds)]
    yield from _loader(dataset, iter([(0, number) for number in numbers if number < total]), config)
    for number in numbers:
        if number >= total:
            yield dataset.assemble(0, number, [])


def _loader(
    dataset: MicroBatches, keys: Iterator[tuple[int, int]], config: Config, *, per_rank: int = 1
) -> DataLoader[MicroBatch]:
    return DataLoader(dataset, sampler=_Sequence(keys), **loader_settings(config, per_rank=per_rank))


def loader_settings(config: Config, *, per_rank: int = 1) -> dict[str, Any]:
    """How a DataLoader runs its processes, whatever the dataset; a whole window of `per_rank` is loaded ahead."""
    workers = config.data.workers
    return {
        "batch_size": None,
        "num_workers": workers,
        "worker_init_fn": _prepare_loader_process,
        "prefetch_factor": max(config.data.prefetch, -(-per_rank // workers)) if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }


@contextmanager
def loader_processes() -> Iterator[None]:
    """Ends the loader processes that were started inside, and turns what PyTorch raises for them into one line.

    Raises:
        UserError: a process died, or failed for a reason outside the program.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except RuntimeError as error:
        dead = re.search(r"worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?", str(error))
        if dead is None:
            raise
        if "Bus error" in str(error):
            raise UserError(
                f"a loader process (pid {dead[1]}) found no room in /dev/shm, where micro-batches are handed over: "
                "enlarge it (docker: --shm-size), or lower data.prefetch or data.workers"
            ) from error
        how = f"was killed ({dead[2].strip()})" if dead[2] else "died"
        raise UserError(
            f"a loader process (pid {dead[1]}) {how}: often for want of memory, of which each of data.workers "
            "processes fills data.prefetch micro-batches; the same command continues from the newest checkpoint"
        ) from error
    except UserError as error:
        if "Original Traceback" not in str(error):
            raise
        # Raised in a loader process: its own message is the last line.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2]) from error
    finally:
        _kill(set(multiprocessing.active_children()) - before)


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """End processes that only read. PyTorch would wait for those that another's death blocks: they ignore SIGTERM."""
    on_death = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for each
    for process in processes:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, on_death)


def _prepare_loader_process(worker: int) -> None:
    """A launcher signals the whole process group; the trainer still needs its loaders to finish the update. It also has
    no garbage collected that has grown old, until it is asked to; a loader has nobody to ask."""
    gc.set_threshold(*THRESHOLDS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check_sample(corpus: Corpus, *, sampling_rate: int, count: int = 8) -> None:
    """Read a few utterances spread over the corpus, so that a wrong manifest fails before the run starts.

    Raises:
        UserError: none of them can be read.
    """
    bounds = np.linspace(0, len(corpus), min(count, len(corpus)) + 1).astype(int)
    reasons = []
    for start, _ in pairwise(bounds):
        cut = corpus.cut(int(start))
        try:
            samples = round(min(cut.duration, BLOCK_SECONDS) * sampling_rate)
            read_audio(cut, sampling_rate=sampling_rate, offset=0, length=samples, normalize=False)
            return
        except AudioError as error:
            reasons.append(f"{cut.id} ({audio_path(cut)}): {error}")
    raise UserError(
        f"{corpus.manifests[0].path}: none of {len(reasons)} utterances tried can be read; the first: {reasons[0]}; "
        f"look at the manifest with: w2vscale data validate {corpus.manifests[0].path}"
    )
