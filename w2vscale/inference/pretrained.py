"""Load a trained model and compute its hidden states for audio of any length, in bounded memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.checkpoint.opening import open_on_all_ranks
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.remote import local_model, model_on_all_ranks
from w2vscale.config import Config, PrecisionConfig
from w2vscale.data.audio import RATES_IN_WORDS, SAMPLING_RATES, AudioError
from w2vscale.data.inputs import audio_batch, to_device
from w2vscale.data.resampling import Samples, resampled
from w2vscale.errors import UserError
from w2vscale.interop.importing import form_of
from w2vscale.models.lengths import hop, input_samples, output_frames
from w2vscale.models.wav2vec2 import EncoderOutput, Statistics
from w2vscale.objectives import Objective, build_objective
from w2vscale.storage.urls import Url, place

CHUNK_SECONDS = 30.0  # longer audio is split into chunks of at most this length
OVERLAP_SECONDS = 2.5  # context on either side of a chunk: computed with it, then dropped
BATCH_SECONDS = 80.0  # padded audio per forward pass: two chunks with their context
BLOCK_SECONDS = 10  # audio is read in blocks of this length


def load(path: str | Path, *, device: str | torch.device | None = None, weights: str | None = None) -> Pretrained:
    """Load a checkpoint folder; or from a run folder or its `checkpoints` folder, the newest intact checkpoint.

    A URL is that of a checkpoint, or of the setting `checkpoint.store`; a copy of it is made on this machine.

    The model is on `device` (by default CUDA if it is available, else the CPU) and in evaluation mode. It computes in
    fp32 regardless of the `precision.compute` that it was trained with, so that features do not depend on the machine.
    `weights`: "ema" for the averaged weights (`optim.ema_decay`), "raw" for those of the last update; by default the
    averaged ones if the checkpoint has them.
    Raises UserError if the checkpoint is missing, damaged or does not fit the model, or the device does not exist.
    """
    return _load(path, local_model(place(path)), open_checkpoint, device, weights)


def load_on_all_ranks(
    path: Path | Url,
    log: Callable[[str], None] = lambda text: None,
    *,
    device: str | torch.device | None = None,
    weights: str | None = None,
) -> Pretrained:
    """Like `load`, but the ranks share the work of comparing the checkpoint with its checksums. Collective.

    Each rank has a whole model. The log names checkpoints that are skipped.
    """
    return _load(path, model_on_all_ranks(path, log), partial(open_on_all_ranks, log=log), device, weights)


def _load(
    source: str | Path,
    local: Path,
    opened: Callable[[Path], CheckpointReader],
    device: str | torch.device | None,
    weights: str | None,
) -> Pretrained:
    try:
        checkpoint = opened(local)
    except UserError as error:
        is_model = form_of(local) is not None and (local.is_dir() or local.suffix in (".pt", ".pth"))
        hint = f"; convert it with: w2vscale import {source} DIR" if is_model else ""
        raise UserError(f"{error}{hint}") from None
    config = checkpoint.config
    objective = build_objective(config.model_copy(update={"precision": PrecisionConfig(compute="fp32")}))
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = checkpoint.build_model(objective, chosen, weights=weights).eval()
        return Pretrained(model, config, objective, checkpoint.state.update, checkpoint.weights_read(weights))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {chosen}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Audio:
    """Mono audio that is read block by block. Raises AudioError if the sampling rate is not in SAMPLING_RATES."""

    sampling_rate: int  # in Hz
    samples: int  # length at `sampling_rate`
    blocks: Callable[[], Iterator[Samples]]  # reads from the beginning, in blocks of any length; may raise AudioError

    def __post_init__(self) -> None:
        if not isinstance(self.sampling_rate, int) or self.sampling_rate not in SAMPLING_RATES:
            raise AudioError("sampling rate", f"sampling rate is {self.sampling_rate} Hz, not {RATES_IN_WORDS}")

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.samples / self.sampling_rate


class Chunk(NamedTuple):
    """Frames of an utterance: [begin, end) are computed, [first, last) are kept, the others are context."""

    begin: int
    first: int
    last: int
    end: int


class Part(NamedTuple):
    """The samples of a chunk, and the GroupNorm statistics of the whole utterance if the chunk is only a part of it."""

    chunk: Chunk
    samples: Samples
    statistics: Statistics | None


class ChunkFeatures(NamedTuple):
    """What the model computes for the frames of one chunk of an utterance, on the CPU."""

    first: int  # number of the first frame in the utterance
    hidden: list[Tensor]  # hidden states [frames, dim] of each requested layer, fp32
    codes_TG: Tensor | None  # discrete codes, if requested and the model has any


@dataclass(frozen=True)
class Pretrained:
    """A trained model in evaluation mode, and the settings of the run that trained it."""

    model: Any
    config: Config
    objective: Objective
    update: int = 0  # of the checkpoint
    weights: str = "raw"  # or "ema"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.encoder.mask_embedding.device
        return device

    def features(
        self,
        waveform: NDArray[np.floating] | Tensor,
        sampling_rate: int,
        *,
        layers: int | Iterable[int] | None = None,
        chunk_seconds: float = CHUNK_SECONDS,
        overlap_seconds: float = OVERLAP_SECONDS,
    ) -> dict[int, Tensor]:
        """Compute hidden states of a waveform: a tensor [frames, dim] for each layer, fp32, on the CPU.

        `waveform` is floating point from -1 to 1, [samples] or [channels, samples] (channels are averaged), at
        `sampling_rate` Hz. It is resampled, and normalised if the model was trained so (`model.normalize_waveform`).

        Layers (default: all) are `hidden_states` of Transformers (5.x): layer 0 is the input of the first block, layer
        n the output of block n. In pre-LN models the last one is the input of the final LayerNorm; apply
        `model.encoder.transformer.final_norm` to get the `last_hidden_state` of Transformers.

        Longer audio is computed in chunks of `chunk_seconds` (`model.max_frames` may make them shorter), with
        `overlap_seconds` of context on either side. Chunking does not change the number of frames, their times, or
        statistics over the whole waveform (normalisation, GroupNorm). Layer 0 is unchanged if the context covers the
        positional convolution (1.3 s in the published models); above it, attention does not see beyond the context.

        Raises UserError if the waveform has another type or shape, is not finite, or is too short for one frame; the
        sampling rate or a layer does not exist; a length is not positive; the context alone exceeds `model.max_frames`.
        """
        chosen = self.resolve_layers(layers)
        samples = _mono(waveform)
        try:
            rate = operator.index(sampling_rate)
        except TypeError:
            raise UserError(f"sampling_rate={sampling_rate!r}: expected a whole number of Hz") from None
        try:
            block = BLOCK_SECONDS * rate
            audio = Audio(rate, samples.size, lambda: (samples[n : n + block] for n in range(0, samples.size, block)))
            found = {layer: torch.empty(self.frames(audio), self.config.model.dim) for layer in chosen}
            stream = self.stream([audio], layers=chosen, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
            _, chunks = next(by_audio(stream))
            for chunk in chunks:
                for whole_TD, chunk_TD in zip(found.values(), chunk.hidden, strict=True):
                    whole_TD[chunk.first : chunk.first + len(chunk_TD)] = chunk_TD
        except AudioError as error:
            raise UserError(f"waveform: {error}") from None
        return found

    def resolve_layers(self, layers: int | Iterable[int] | None) -> list[int]:
        """Return the layers in ascending order without duplicates; None means all. Raises UserError for bad ones."""
        last = self.config.model.layers
        try:
            chosen = [layers] if isinstance(layers, int | np.integer) else range(last + 1) if layers is None else layers
            resolved = sorted({operator.index(layer) for layer in chosen})
        except TypeError:
            raise UserError(f"layers={layers!r}: expected whole numbers from 0 to {last}") from None
        if not resolved:
            raise UserError("layers: empty; choose at least one")
        for layer in resolved:
            if not 0 <= layer <= last:
                raise UserError(f"layer {layer}: the model has layers 0 to {last}")
        return resolved

    def blocks(self, audio: Audio) -> Iterator[Samples]:
        """Read an audio, resampled to the sampling rate of the model."""
        for block in resampled(audio.blocks(), audio.sampling_rate, self.config.model.sampling_rate):
            if not np.isfinite(block).all():
                raise AudioError("not finite", "contains samples that are not finite")
            yield block

    def frames(self, audio: Audio) -> int:
        """The number of frames of an audio; 0 if it is too short."""
        return output_frames(self._samples(audio), self.config.model)

    @torch.no_grad()
    def stream(
        self,
        audios: Iterable[Audio],
        *,
        layers: Sequence[int],
        chunk_seconds: float = CHUNK_SECONDS,
        overlap_seconds: float = OVERLAP_SECONDS,
        batch_seconds: float = BATCH_SECONDS,
        codes: bool = False,
    ) -> Iterator[tuple[int, ChunkFeatures | AudioError]]:
        """Compute hidden states of several audios: pairs of the position of an audio and its next chunk or error.

        Chunks come audio by audio, in order and without gaps; an error is the last item of its audio (see `by_audio`).
        Consecutive chunks share a forward pass of at most `batch_seconds` of padded audio (at least one chunk), so
        sort the audios by length. `codes` adds the discrete codes of the frames, where the model has any.
        Raises UserError if a length is not positive, or the context alone exceeds `model.max_frames`.
        """
        for name, value in (("chunk_seconds", chunk_seconds), ("batch_seconds", batch_seconds)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be above 0 seconds")
        if not 0 <= overlap_seconds < math.inf:
            raise UserError(f"overlap_seconds={overlap_seconds}: must be at least 0 seconds")
        config = self.config.model
        frame_rate = config.sampling_rate / hop(config)
        chunk_frames = max(round(chunk_seconds * frame_rate), 1)
        overlap_frames = round(overlap_seconds * frame_rate)
        max_samples = round(batch_seconds * config.sampling_rate)
        batch: list[tuple[int, Part]] = []

        def run() -> Iterator[tuple[int, ChunkFeatures]]:
            encoded = self._encode([part for _, part in batch], layers)
            codes_BTG = self.objective.codes(self.model, encoded) if codes else None
            states = encoded.hidden
            hidden = [states[layer].float().cpu() for layer in layers]
            for row, (number, (chunk, _, _)) in enumerate(batch):
                kept = (row, slice(chunk.first - chunk.begin, chunk.last - chunk.begin))
                codes_TG = None if codes_BTG is None else codes_BTG[kept].cpu()
                yield number, ChunkFeatures(chunk.first, [state_BTD[kept] for state_BTD in hidden], codes_TG)
            batch.clear()

        for number, audio in enumerate(audios):
            try:
                for part in self._parts(audio, chunk_frames, overlap_frames):
                    longest = max([part.samples.size, *(other.samples.size for _, other in batch)])
                    mixed = batch and (batch[0][1].statistics is None) != (part.statistics is None)
                    if batch and (mixed or (len(batch) + 1) * longest > max_samples):
                        yield from run()
                    batch.append((number, part))
            except AudioError as error:
                if batch:
                    yield from run()
                yield number, error
        if batch:
            yield from run()

    def _parts(self, audio: Audio, chunk_frames: int, overlap_frames: int) -> Iterator[Part]:
        """Split an utterance into chunks and read their samples one after the other."""
        config = self.config.model
        whole = self._samples(audio)
        frames = output_frames(whole, config)
        if frames == 0:
            needed = input_samples(1, config)
            raise AudioError("too short", f"has {whole} samples, fewer than the {needed} of one frame")
        limit = config.max_frames
        if limit is not None and frames > min(chunk_frames, limit):
            chunk_frames = min(chunk_frames, limit - 2 * overlap_frames)
            if chunk_frames < 1:
                raise UserError(
                    f"overlap_seconds: {overlap_frames} frames of context on either side leave no room for a chunk "
                    f"within model.max_frames={limit}; choose a shorter overlap"
                )
        chunks = split_into_chunks(frames, chunk_frames=chunk_frames, overlap_frames=overlap_frames)
        mean, deviation = 0.0, 1.0
        if config.normalize_waveform:
            mean, deviation = _mean_and_deviation(self.blocks(audio), config.waveform_eps)

        def normalised() -> Iterator[Samples]:
            return (((block - mean) / deviation).astype(np.float32) for block in self.blocks(audio))

        statistics = None
        if len(chunks) > 1 and config.conv_norm == "group":
            statistics = self.model.encoder.feature_encoder.statistics(map(torch.from_numpy, normalised()))
        blocks = normalised()
        held, position = np.empty(0, np.float32), 0
        for chunk in chunks:
            start = chunk.begin * hop(config)
            stop = whole if chunk.end == frames else start + input_samples(chunk.end - chunk.begin, config)
            while position + held.size < stop:
                held = np.concatenate([held, next(blocks)])
            held, position = held[start - position :], start
            yield Part(chunk, held[: stop - start], statistics)

    def _samples(self, audio: Audio) -> int:
        """The length of an audio in samples, at the sampling rate of the model."""
        return -(-audio.samples * self.config.model.sampling_rate // audio.sampling_rate)

    def _encode(self, parts: Sequence[Part], layers: Sequence[int]) -> EncoderOutput:
        """Run the encoder on a batch of chunks, up to the highest requested layer."""
        config = self.config.model
        audio = to_device(audio_batch([part.samples for part in parts], config, width=0), self.device)
        given = [part.statistics for part in parts if part.statistics is not None]
        encoded: EncoderOutput = self.model.encoder(
            audio.waveforms_BS.to(self.objective.compute_dtype),
            audio.lengths,
            active=[block < max(layers) for block in range(config.layers)],
            statistics=tuple(map(torch.cat, zip(*given, strict=True))) if given else None,
        )
        return encoded


def split_into_chunks(frames: int, *, chunk_frames: int, overlap_frames: int) -> list[Chunk]:
    """Split an utterance into chunks of about equal length, each with up to `overlap_frames` of context per side."""
    count = -(-frames // chunk_frames)
    edges = [frames * number // count for number in range(count + 1)]
    return [
        Chunk(max(first - overlap_frames, 0), first, last, min(last + overlap_frames, frames))
        for first, last in pairwise(edges)
    ]


def by_audio(stream: Iterator[tuple[int, ChunkFeatures | AudioError]]) -> Iterator[tuple[int, Iterator[ChunkFeatures]]]:
    """Group the items of `Pretrained.stream` by audio: pairs of an audio's position and its chunks.

    Iterate over the chunks of an audio before asking for the next audio. Iterating raises the AudioError of the audio.
    """
    for number, items in groupby(stream, key=operator.itemgetter(0)):
        yield number, _chunks(items)


def _chunks(items: Iterator[tuple[int, ChunkFeatures | AudioError]]) -> Iterator[ChunkFeatures]:
    for _, item in items:
        if isinstance(item, AudioError):
            raise item
        yield item


def _mono(waveform: NDArray[np.floating] | Tensor) -> Samples:
    if isinstance(waveform, Tensor):
        # NumPy has no bfloat16.
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).detach().cpu().numpy()
    try:
        array = np.asarray(waveform)
    except ValueError:
        raise UserError("waveform: not an array (its rows differ in length)") from None
    if array.dtype.kind != "f":
        raise UserError(f"waveform: {array.dtype}: expected floating point from -1 to 1; divide int16 by 32768")
    shape = list(array.shape)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 0 < shape[0] <= shape[1]):
        raise UserError(f"waveform: shape {shape}: expected [samples] or [channels, samples]")
    samples: Samples = array.astype(np.float32, copy=False)
    return samples if array.ndim == 1 else samples.mean(axis=0)


def _mean_and_deviation(blocks: Iterable[Samples], eps: float) -> tuple[float, float]:
    """Mean and standard deviation over all samples; `eps` is added to the variance."""
    sums = np.zeros(3)
    for block in blocks:
        sums += block.size, block.sum(dtype=np.float64), np.square(block, dtype=np.float64).sum()
    mean, square = sums[1:] / sums[0]
    return mean, math.sqrt(max(square - mean**2, 0.0) + eps)
