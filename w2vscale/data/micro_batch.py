"""The unit of loss: a micro-batch of audio with everything that was drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.config.tree import ModelConfig
from w2vscale.data.inputs import Inputs, PretrainingInputs, pack, pin, unpack
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.models.lengths import output_frames
from w2vscale.objectives.masking import frame_mask, negative_indices


@dataclass(frozen=True)
class BadAudio:
    """An utterance that was left out, or a noise that was not added, and why: `kind` is a word, `reason` says all."""

    utterance: str
    file: str
    kind: str
    reason: str
    left_out: bool = True


@dataclass(frozen=True)
class MicroBatch(Generic[Inputs]):
    """Micro-batch `number` of the plan, run in update `update`."""

    update: int
    number: int
    inputs: Inputs
    audio_samples: int
    bad: tuple[BadAudio, ...] = ()

    @property
    def weight(self) -> int:
        """Its share of the update's loss denominator: masked frames, or labels in fine-tuning."""
        return sum(self.inputs.weights)

    @property
    def padded_samples(self) -> int:
        """Samples computed, padding included."""
        return self.inputs.waveforms_BS.numel()

    @property
    def utterances(self) -> int:
        """Utterances with audio."""
        return int(self.audio_samples > 0) * sum(self.inputs.utterances)

    @property
    def frames(self) -> int:
        """Valid frames."""
        return int(self.inputs.frames_B.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": (type(self.inputs), *pack(self.inputs))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, inputs=unpack(*state["inputs"]))

    def pin_memory(self) -> MicroBatch[Inputs]:
        """A copy in pinned memory (called by the DataLoader)."""
        return replace(self, inputs=pin(self.inputs))


def make_inputs(
    waveforms: Sequence[NDArray[np.float32]],
    slots: Sequence[int],
    *,
    number: int,
    seed: int,
    config: ModelConfig,
    width: int = 0,
) -> PretrainingInputs:
    """Pad utterances to the longest, and no less than `width` samples; draw their masks and negatives.

    `slots` are the utterances' places in the planned micro-batch: an utterance's draws depend on (seed, number,
    place) alone, so one that is left out changes no other. Without any utterance the result is one of silence that
    no frame of is masked: it can be computed, and weighs nothing.
    """
    silent = not waveforms
    if silent:
        waveforms = [np.zeros(shortest_samples(config), dtype=np.float32)]
        slots = [0]
    padded, lengths = pad_waveforms(waveforms, width)
    frames = np.array([output_frames(int(length), config) for length in lengths])
    masks = np.zeros((len(waveforms), output_frames(padded.shape[1], config)), dtype=np.bool_)
    negatives = []
    for row, place in enumerate(slots):
        draws = generator(seed, Stream.MASK, number, place)
        if not silent:
            masks[row, : frames[row]] = frame_mask(int(frames[row]), config, draws)
        negatives.append(negative_indices(int(masks[row].sum()), config.negatives, draws))
    utterance, frame = masks.nonzero()
    counts = masks.sum(axis=1)
    slot = np.arange(utterance.size) - (np.cumsum(counts) - counts)[utterance]
    return PretrainingInputs(
        waveforms_BS=padded,
        lengths_B=torch.from_numpy(lengths),
        frames_B=torch.from_numpy(frames),
        mask_BT=torch.from_numpy(masks),
        utterance_M=torch.from_numpy(utterance),
        frame_M=torch.from_numpy(frame),
        slot_M=torch.from_numpy(slot),
        negatives_MK=torch.from_numpy(np.concatenate(negatives)),
        utterances=(len(waveforms),),
        masked=(int(utterance.size),),
        slots=int(counts.max()),
        padded=bool((lengths != padded.shape[1]).any()),
    )


def pad_waveforms(waveforms: Sequence[NDArray[np.float32]], width: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Waveforms padded to the longest, and no less than `width` samples, [B, S]; and their lengths."""
    lengths = np.array([waveform.size for waveform in waveforms])
    padded = torch.zeros(len(waveforms), max(width, int(lengths.max())))
    for row_S, waveform in zip(padded, waveforms, strict=True):
        row_S[: waveform.size] = torch.from_numpy(waveform)
    return padded, lengths


def shortest_samples(config: ModelConfig) -> int:
    """Samples of the shortest utterance that has `mask_length` + 2 frames: enough to be masked."""
    samples = config.mask_length + config.mask_min_spans
    for _, kernel, stride in reversed(config.conv_layers):
        samples = (samples - 1) * stride + kernel
    return samples


def gumbel_noise(batches: Sequence[MicroBatch], *, seed: int, config: ModelConfig, device: torch.device) -> Tensor:
    """Standard Gumbel noise [M, G, V] fp32: for each micro-batch from its own generator."""
    draws = torch.Generator(device)
    noise = [torch.empty(0, config.codebooks, config.codebook_entries, device=device)]
    for batch in batches:
        draws.manual_seed(derived_seed(seed, Stream.GUMBEL, batch.number))
        shape = (batch.weight, config.codebooks, config.codebook_entries)
        noise.append(-torch.empty(shape, device=device).exponential_(generator=draws).log())
    return torch.cat(noise)
