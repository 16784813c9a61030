"""The audio of planned micro-batches: read, check, normalise, crop, pad, mask; and the DataLoader around it."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import soundfile
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from w2vscale.config import Config
from w2vscale.data.manifest import Corpus, audio_path
from w2vscale.data.micro_batch import BadAudio, MicroBatch, make_inputs, shortest_samples
from w2vscale.data.plan import Plan, window_numbers
from w2vscale.data.validate import libsndfile_reason, problem_of
from w2vscale.errors import UserError
from w2vscale.models.feature_encoder import output_frames

VALIDATION_SEED = 20
"""Validation draws its order, crops, masks and negatives from this, so that all runs validate on the same."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop."""

LENGTH_TOLERANCE = 0.02
"""Seconds by which decoded audio may differ from its manifest: resampling and MP3 frames round."""


class AudioError(ValueError):
    """An utterance's audio cannot be used; the message is the reason."""


def read_audio(cut: Cut, *, sampling_rate: int, offset: int, length: int, normalize: bool) -> NDArray[np.float32]:
    """`length` samples of an utterance from sample `offset`, resampled to `sampling_rate` (Hz), channels averaged.

    With `normalize`, mean and variance are those of the whole utterance, before cropping.

    Raises:
        AudioError: the file cannot be decoded, disagrees with its manifest, or holds no usable signal.
    """
    if reason := problem_of(cut):
        raise AudioError(reason)
    wanted = cut if cut.sampling_rate == sampling_rate else cut.resample(sampling_rate)
    whole = round(cut.duration * sampling_rate)
    if normalize or length >= whole:
        audio = _decode(wanted, whole, source=cut)
        _refuse_silence(audio)
        if normalize:
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        return audio[offset : offset + length]
    part = wanted.truncate(offset=offset / sampling_rate, duration=length / sampling_rate, preserve_id=True)
    audio = _decode(part, length, source=cut)
    if audio.min() == audio.max():  # a pause in a good utterance, or an utterance without signal
        _refuse_silence(_decode(wanted, whole, source=cut))
    return audio


def _refuse_silence(audio: NDArray[np.float32]) -> None:
    if audio.min() == audio.max():
        raise AudioError("is silent: all samples are equal")


def _decode(cut: Cut, samples: int, *, source: Cut) -> NDArray[np.float32]:
    try:
        audio = cut.load_audio()
    except Exception as error:
        raise AudioError(_decoding_problem(source, error)) from None
    if audio is None or audio.size == 0:
        raise AudioError("holds no audio")
    mono = audio.mean(axis=0, dtype=np.float32)
    if abs(mono.size - samples) > LENGTH_TOLERANCE * cut.sampling_rate:
        raise AudioError(f"lasts {mono.size} samples, not {samples} as its manifest says")
    if not np.isfinite(mono).all():
        raise AudioError("holds samples that are not finite")
    return np.pad(mono[:samples], (0, max(samples - mono.size, 0)))


def _decoding_problem(cut: Cut, error: Exception) -> str:
    """Why a file whose header is right cannot be decoded.

    Asks libsndfile: Lhotse goes on to other libraries, and may report no more than that they are missing.
    """
    try:
        frames = len(soundfile.read(audio_path(cut))[0])
    except Exception as first:
        return f"cannot be decoded: {libsndfile_reason(first)}"
    if frames != cut.recording.num_samples:
        return f"cannot be decoded: ends after {frames} of {cut.recording.num_samples} samples"
    return f"cannot be decoded: {libsndfile_reason(error)}"


class MicroBatches(Dataset[MicroBatch]):
    """Loads micro-batches by (update, number). A pure function of the corpus, the plan and the seed."""

    def __init__(self, corpus: Corpus, plan: Plan, config: Config, *, seed: int) -> None:
        self.corpus = corpus
        self.plan = plan
        self.model = config.model
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch:
        update, number = key
        planned = self.plan.micro_batch(number)
        waveforms: list[NDArray[np.float32]] = []
        places: list[int] = []
        bad: list[BadAudio] = []
        for place, utterance in enumerate(planned.utterances):
            try:
                cut = self.corpus.cut(int(utterance))
            except UserError as error:  # the manifest was changed under the run
                bad.append(BadAudio(f"number {utterance}", "", str(error)))
                continue
            try:
                audio = read_audio(
                    cut,
                    sampling_rate=self.model.sampling_rate,
                    offset=int(planned.offsets[place]),
                    length=int(planned.lengths[place]),
                    normalize=self.model.normalize_waveform,
                )
            except AudioError as error:
                bad.append(BadAudio(cut.id, audio_path(cut), str(error)))
                continue
            waveforms.append(audio)
            places.append(place)
        inputs = make_inputs(waveforms, places, number=number, seed=self.seed, config=self.model)
        samples = sum(waveform.size for waveform in waveforms)
        return MicroBatch(update, number, inputs, samples, tuple(bad))


class _Sequence(Sampler[tuple[int, int]]):
    """Hands the DataLoader the keys of one rank, in order."""

    def __init__(self, keys: Iterator[tuple[int, int]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.keys


def make_plan(corpus: Corpus, config: Config, *, seed: int) -> Plan:
    """The plan of a corpus under a run's settings.

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
    try:
        return Plan(
            corpus.samples(rate),
            max_samples=max_samples,
            min_samples=max(int(config.data.min_seconds * rate), shortest),
            budget_samples=int(config.batch.max_seconds * rate),
            buckets=config.batch.buckets,
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{', '.join(str(manifest.path) for manifest in corpus.manifests)}: {error}") from None


def windows(
    dataset: MicroBatches, config: Config, *, updates: range, rank: int = 0, world_size: int = 1
) -> Iterator[list[MicroBatch]]:
    """For each update its window: the micro-batches that this rank runs, loaded ahead by worker processes."""
    per_rank = config.batch.micro_batches // world_size
    keys = window_numbers(
        dataset.plan,
        updates=updates,
        micro_batches=config.batch.micro_batches,
        rank=rank,
        world_size=world_size,
    )
    loader = iter(_loader(dataset, keys, config))
    for _ in updates:
        yield [next(loader) for _ in range(per_rank)]


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
            inputs = make_inputs([], [], number=number, seed=dataset.seed, config=config.model)
            yield MicroBatch(0, number, inputs, 0)


def _loader(dataset: MicroBatches, keys: Iterator[tuple[int, int]], config: Config) -> DataLoader[MicroBatch]:
    workers = config.data.workers
    return DataLoader(
        dataset,
        sampler=_Sequence(keys),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        prefetch_factor=config.data.prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A launcher signals the whole process group; the trainer still needs its loaders to finish the update."""
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
            samples = round(cut.duration * sampling_rate)
            read_audio(cut, sampling_rate=sampling_rate, offset=0, length=samples, normalize=False)
            return
        except AudioError as error:
            reasons.append(f"{cut.id} ({audio_path(cut)}): {error}")
    raise UserError(
        f"{corpus.manifests[0].path}: none of {len(reasons)} utterances tried can be read; the first: {reasons[0]}; "
        f"look at the manifest with: w2vscale data validate {corpus.manifests[0].path}"
    )


def bad_audio_error(bad: int, seen: int, last: Sequence[BadAudio], limit: float) -> UserError:
    """What a run says when too much of its audio is unusable."""
    example = f"; the last: {last[-1].utterance} ({last[-1].file}): {last[-1].reason}" if last else ""
    return UserError(
        f"{bad} of {seen} utterances are unusable, above data.max_bad_fraction={limit:g}{example}; "
        "all are listed in the run's logs/bad_audio.jsonl"
    )
