"""A trained model to use from Python: the hidden states of any waveform, of any length, in bounded memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.checkpoint.reading import load_model_weights, open_checkpoint
from w2vscale.config import Config, ModelConfig, load_config
from w2vscale.data.audio import EPSILON, AudioError
from w2vscale.errors import UserError
from w2vscale.inference.resampling import Samples, resampled
from w2vscale.interop.importing import form_of
from w2vscale.models.build import Wav2Vec2, build_model
from w2vscale.models.lengths import input_samples, output_frames
from w2vscale.models.wav2vec2 import EncoderOutput, Statistics
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.objectives.quantizer import Quantized

CHUNK_SECONDS = 30.0
"""Longer audio is computed in chunks of at most this."""

OVERLAP_SECONDS = 2.5
"""What is computed before and after a chunk as its context, and dropped."""

BATCH_SECONDS = 80.0
"""Padded audio of one forward: two chunks with their context."""

BLOCK_SECONDS = 10
"""What is read of audio at a time."""

SAMPLING_RATES = range(1000, 500_001)
"""Hz that audio may have; a header that says anything else is damaged."""


def load(path: str | Path, *, device: str | torch.device | None = None) -> Pretrained:
    """Open a checkpoint (its folder, or the newest usable one of a run's or a checkpoints folder) for inference.

    The model is in evaluation mode, on `device` (default: CUDA where there is a GPU), and computes in fp32 whatever
    `precision.compute` it was trained with, so that features are the same everywhere. Its weights are always fp32.

    Raises:
        UserError: the checkpoint is missing, damaged or of another model; there is no such device.
    """
    try:
        checkpoint = open_checkpoint(Path(path))
    except UserError as error:
        raise UserError(f"{error}{_import_hint(Path(path))}") from None
    config = load_config(checkpoint.path / "config.yaml")
    model = build_model(config.model, config.ctc)
    load_model_weights(checkpoint, model)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return Pretrained(model.to(chosen).eval(), config)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {chosen}: {str(error).splitlines()[0]}") from None


def _import_hint(path: Path) -> str:
    form = form_of(path)
    if form is None:
        return ""
    return f"; another library's model is made a checkpoint by: w2vscale import {path} DIR --format {form}"


@dataclass(frozen=True)
class Audio:
    """Audio that can be read more than once, from its beginning, a block at a time.

    `samples` is the length at `sampling_rate` (Hz). Blocks are mono, of any length, and add up to `samples`; reading
    them may raise AudioError.

    Raises:
        AudioError: no audio has such a sampling rate.
    """

    sampling_rate: int
    samples: int
    blocks: Callable[[], Iterator[Samples]]

    def __post_init__(self) -> None:
        if not isinstance(self.sampling_rate, int) or self.sampling_rate not in SAMPLING_RATES:
            wanted = f"a whole number from {SAMPLING_RATES[0]:,} to {SAMPLING_RATES[-1]:,}"
            raise AudioError("sampling rate", f"sampling rate is {self.sampling_rate} Hz, not {wanted}")


class Window(NamedTuple):
    """Frames [begin, end) of an utterance are computed; [first, last) of them are kept."""

    begin: int
    first: int
    last: int
    end: int


class Part(NamedTuple):
    """The samples of a window, and GroupNorm's statistics of the whole utterance where the window is a part of it."""

    window: Window
    samples: Samples
    statistics: Statistics | None


class Piece(NamedTuple):
    """The hidden states of some frames of an utterance, the first of them frame `first`."""

    first: int
    hidden: list[Tensor]  # of each wanted layer [frames, dim], fp32, on the CPU
    codes_TG: Tensor | None = None  # the entry of each codebook that the quantizer chooses, where wanted


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model in evaluation mode, and the settings of the run that trained it."""

    model: Wav2Vec2
    config: Config

    def features(
        self,
        waveform: NDArray[np.floating] | Tensor,
        sampling_rate: int,
        *,
        layers: int | Iterable[int] | None = None,
        chunk_seconds: float = CHUNK_SECONDS,
        overlap_seconds: float = OVERLAP_SECONDS,
    ) -> dict[int, Tensor]:
        """Hidden states of a waveform [samples] or [channels, samples] (averaged) in floating point, from -1 to 1.

        The waveform is resampled from `sampling_rate` (Hz) to the model's and, where the model was trained so
        (`model.normalize_waveform`), brought to zero mean and unit variance as a whole.

        Returns, of each layer in `layers` (or of one; default: all), a tensor [frames, dim], fp32, on the CPU. Layer 0
        is the input of the first block (with positions, and normalised in post-LN models); layer n is the output of
        block n. These are Transformers' `hidden_states` (5.x). Of pre-LN models the last one is what enters the final
        LayerNorm: `model.encoder.transformer.final_norm` makes it Transformers' `last_hidden_state`.

        A waveform above `chunk_seconds` (or `model.max_frames`) is computed in chunks, each with up to
        `overlap_seconds` of context on either side that is then dropped. The number of frames, their times, and all
        that is taken over the waveform as a whole (normalisation, GroupNorm's statistics) stay as without chunks.
        Layer 0 is equal, if the context covers the positional convolution (1.3 s in the published models); above it,
        attention sees the chunk and its context in place of the whole.

        Raises:
            UserError: the waveform is no such array, not finite, or too short for one frame; the sampling rate is not
                one; there is no such layer; a length is not positive; the context is above what the model takes
                (`model.max_frames`).
        """
        wanted = self.checked_layers(layers)
        samples = _mono(waveform)
        try:
            block = BLOCK_SECONDS * operator.index(sampling_rate)
            audio = Audio(
                sampling_rate=operator.index(sampling_rate),
                samples=samples.size,
                blocks=lambda: (samples[start : start + block] for start in range(0, samples.size, block)),
            )
        except TypeError:
            raise UserError(f"sampling_rate={sampling_rate!r}: wanted a whole number of Hz") from None
        except AudioError as error:
            raise UserError(f"waveform: {error}") from None
        frames = self.frames(audio)
        found = {layer: torch.empty(frames, self.config.model.dim) for layer in wanted}
        pieces = self.stream([audio], layers=wanted, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
        for _, piece in pieces:
            if isinstance(piece, AudioError):
                raise UserError(f"waveform: {piece}")
            for whole, part in zip(found.values(), piece.hidden, strict=True):
                whole[piece.first : piece.first + part.shape[0]] = part
        return found

    def checked_layers(self, layers: int | Iterable[int] | None) -> list[int]:
        """The layers wanted, ascending, each once; None means all.

        Raises:
            UserError: the model has no such layer, or none is wanted.
        """
        last = self.config.model.layers
        try:
            chosen = [layers] if isinstance(layers, int | np.integer) else range(last + 1) if layers is None else layers
            wanted = sorted({operator.index(layer) for layer in chosen})
        except TypeError:
            raise UserError(f"layers={layers!r}: wanted whole numbers from 0 to {last}") from None
        if not wanted:
            raise UserError("layers: none chosen")
        for layer in wanted:
            if not 0 <= layer <= last:
                raise UserError(f"layer {layer}: the model has layers 0 to {last}")
        return wanted

    def frames(self, audio: Audio) -> int:
        """Frames that audio gives; 0 if it is too short."""
        return output_frames(self._samples(audio), self.config.model)

    def stream(
        self,
        audios: Iterable[Audio],
        *,
        layers: Sequence[int],
        chunk_seconds: float = CHUNK_SECONDS,
        overlap_seconds: float = OVERLAP_SECONDS,
        batch_seconds: float = BATCH_SECONDS,
        codes: bool = False,
    ) -> Iterator[tuple[int, Piece | AudioError]]:
        """The hidden states of several audios, as pairs of an audio's number and a piece of it or what is wrong.

        With `codes`, the quantizer's choices too; a fine-tuned model has none.

        Pieces come in order and without gaps, audio by audio; nothing follows an error of the same audio. Chunks that
        follow each other share a forward of at most `batch_seconds` (at least one chunk); neighbours should be of
        about the same length.

        Raises:
            UserError: a length is not positive; the context is above what the model takes (`model.max_frames`).
        """
        for name, value in (("chunk_seconds", chunk_seconds), ("batch_seconds", batch_seconds)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be above 0 seconds")
        if not 0 <= overlap_seconds < math.inf:
            raise UserError(f"overlap_seconds={overlap_seconds}: must be at least 0 seconds")
        config = self.config.model
        frame_rate = config.sampling_rate / hop(config)
        chunk, overlap = max(round(chunk_seconds * frame_rate), 1), round(overlap_seconds * frame_rate)
        most = round(batch_seconds * config.sampling_rate)
        batch: list[tuple[int, Part]] = []

        def run() -> Iterator[tuple[int, Piece]]:
            encoded = self._encode([part for _, part in batch], layers)
            chosen_BTG = self._codes(encoded) if codes else None
            hidden = [encoded.hidden[layer].float().cpu() for layer in layers]
            for row, (number, (window, _, _)) in enumerate(batch):
                kept = (row, slice(window.first - window.begin, window.last - window.begin))
                states = [state_BTD[kept] for state_BTD in hidden]
                yield number, Piece(window.first, states, None if chosen_BTG is None else chosen_BTG[kept])
            batch.clear()

        for number, audio in enumerate(audios):
            try:
                for part in self._parts(audio, chunk, overlap):
                    longest = max([part.samples.size, *(other.samples.size for _, other in batch)])
                    mixed = batch and (batch[0][1].statistics is None) != (part.statistics is None)
                    if batch and (mixed or (len(batch) + 1) * longest > most):
                        yield from run()
                    batch.append((number, part))
            except AudioError as error:
                if batch:
                    yield from run()
                yield number, error
        if batch:
            yield from run()

    def _parts(self, audio: Audio, chunk: int, overlap: int) -> Iterator[Part]:
        """The windows of an utterance, read one after the other."""
        config = self.config.model
        whole = self._samples(audio)
        frames = output_frames(whole, config)
        if frames == 0:
            needed = input_samples(1, config)
            raise AudioError("too short", f"lasts {whole} samples, the model needs {needed} for a frame")
        most = config.max_frames
        if most is not None and frames > min(chunk, most):
            chunk = min(chunk, most - 2 * overlap)
            if chunk < 1:
                raise UserError(
                    f"overlap_seconds: {overlap} frames on either side leave nothing of the {most} frames that the "
                    "model takes at once (model.max_frames)"
                )
        windows = windows_of(frames, chunk=chunk, overlap=overlap)
        mean, deviation = _moments(self._blocks(audio)) if config.normalize_waveform else (0.0, 1.0)

        def normalised() -> Iterator[Samples]:
            return (((block - mean) / deviation).astype(np.float32) for block in self._blocks(audio))

        blocks = normalised()
        statistics = self._statistics(normalised()) if len(windows) > 1 and config.conv_norm == "group" else None
        held, position = np.empty(0, np.float32), 0
        for window in windows:
            start = window.begin * hop(config)
            stop = whole if window.end == frames else start + input_samples(window.end - window.begin, config)
            while position + held.size < stop:
                held = np.concatenate([held, next(blocks)])
            held, position = held[start - position :], start
            yield Part(window, held[: stop - start], statistics)

    def _samples(self, audio: Audio) -> int:
        """Length at the model's sampling rate."""
        return -(-audio.samples * self.config.model.sampling_rate // audio.sampling_rate)

    def _blocks(self, audio: Audio) -> Iterator[Samples]:
        """All of an utterance at the model's sampling rate.

        Raises:
            AudioError: it cannot be read, or is not finite.
        """
        for block in resampled(audio.blocks(), audio.sampling_rate, self.config.model.sampling_rate):
            if not np.isfinite(block).all():
                raise AudioError("not finite", "holds samples that are not finite")
            yield block

    @torch.no_grad()
    def _statistics(self, blocks: Iterator[Samples]) -> Statistics:
        """GroupNorm's statistics of a whole utterance."""
        return self.model.encoder.feature_encoder.statistics(torch.from_numpy(block) for block in blocks)

    @torch.no_grad()
    def _encode(self, parts: Sequence[Part], layers: Sequence[int]) -> EncoderOutput:
        """What the encoder computes of some parts; blocks above the highest layer are not run."""
        device = self.model.encoder.mask_embedding.device
        lengths_B = torch.tensor([part.samples.size for part in parts])
        frames_B = torch.tensor([output_frames(part.samples.size, self.config.model) for part in parts])
        waveforms_BS = torch.zeros(len(parts), int(lengths_B.max()))
        for row_S, part in zip(waveforms_BS, parts, strict=True):
            row_S[: part.samples.size] = torch.from_numpy(part.samples)
        padded = len({part.samples.size for part in parts}) > 1
        given = [part.statistics for part in parts if part.statistics is not None]
        encoded: EncoderOutput = self.model.encoder(
            waveforms_BS.to(device, self.model.compute_dtype),
            lengths_B.to(device) if padded else None,
            frames_B.to(device) if padded else None,
            active=[block < max(layers) for block in range(self.config.model.layers)],
            statistics=(torch.cat([mean for mean, _ in given]), torch.cat([variance for _, variance in given]))
            if given
            else None,
        )
        return encoded

    @torch.no_grad()
    def _codes(self, encoded: EncoderOutput) -> Tensor:
        """The quantizer's choices [B, T, G], on the CPU."""
        assert isinstance(self.model, Wav2Vec2ForPretraining)
        projected = self.config.model.quantizer_input == "projected"
        targets_BTC = encoded.projected_BTD if projected else encoded.normalised_BTC
        batch, frames = targets_BTC.shape[:2]
        quantized: Quantized = self.model.quantizer(targets_BTC.flatten(0, 1), None, 1.0)
        return quantized.codes_MG.view(batch, frames, -1).cpu()


def windows_of(frames: int, *, chunk: int, overlap: int) -> list[Window]:
    """Windows whose kept parts are of about equal length, at most `chunk` frames, and make up the whole."""
    count = -(-frames // chunk)
    edges = [frames * number // count for number in range(count + 1)]
    return [
        Window(max(first - overlap, 0), first, last, min(last + overlap, frames)) for first, last in pairwise(edges)
    ]


def hop(config: ModelConfig) -> int:
    """Samples from one frame to the next."""
    return math.prod(stride for _, _, stride in config.conv_layers)


def _mono(waveform: NDArray[np.floating] | Tensor) -> Samples:
    if isinstance(waveform, Tensor):
        # NumPy has no bfloat16.
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).detach().cpu().numpy()
    try:
        array = np.asarray(waveform)
    except ValueError:
        raise UserError("waveform: not an array: its parts differ in length") from None
    if array.dtype.kind != "f":
        raise UserError(f"waveform: {array.dtype}: wanted floating point, from -1 to 1: divide int16 by 32768")
    shape = list(array.shape)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 0 < shape[0] <= shape[1]):
        raise UserError(f"waveform: shape {shape}: wanted [samples] or [channels, samples]")
    samples: Samples = array.astype(np.float32, copy=False)
    return samples if array.ndim == 1 else samples.mean(axis=0)


def _moments(blocks: Iterable[Samples]) -> tuple[float, float]:
    """Mean and standard deviation of all samples."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        count += block.size
        total += float(block.sum(dtype=np.float64))
        squares += float(np.square(block, dtype=np.float64).sum())
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean**2, 0.0) + EPSILON)
