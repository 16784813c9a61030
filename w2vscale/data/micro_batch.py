"""The unit of loss: a micro-batch of audio with everything that was drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.config.tree import ModelConfig
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.models.feature_encoder import output_frames
from w2vscale.models.inputs import PretrainingInputs
from w2vscale.models.masking import negative_indices, span_mask


@dataclass(frozen=True)
class BadAudio:
    """An utterance that was left out, or a noise that was not added, and why: `kind` is a word, `reason` says all."""

    utterance: str
    file: str
    kind: str
    reason: str
    left_out: bool = True


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `number` of the plan, run in update `update`."""

    update: int
    number: int
    inputs: PretrainingInputs
    audio_samples: int
    bad: tuple[BadAudio, ...] = ()

    @property
    def masked(self) -> int:
        """Masked frames: this micro-batch's share of the update's loss denominator."""
        return sum(self.inputs.masked)

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
        return {**self.__dict__, "inputs": self.inputs.packed()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, inputs=PretrainingInputs.unpacked(*state["inputs"]))

    def pin_memory(self) -> MicroBatch:
        """A copy in pinned memory (called by the DataLoader)."""
        return replace(self, inputs=self.inputs.pin_memory())


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
    lengths = np.array([waveform.size for waveform in waveforms])
    frames = np.array([output_frames(int(length), config) for length in lengths])
    width = max(width, int(lengths.max()))
    masks = np.zeros((len(waveforms), output_frames(width, config)), dtype=np.bool_)
    padded = torch.zeros(len(waveforms), width)
    negatives = []
    for row, (waveform, place) in enumerate(zip(waveforms, slots, strict=True)):
        padded[row, : waveform.size] = torch.from_numpy(waveform)
        draws = generator(seed, Stream.MASK, number, place)
        if not silent:
            masks[row, : frames[row]] = span_mask(int(frames[row]), config, draws)
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
        padded=bool((lengths != width).any()),
    )


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
        shape = (batch.masked, config.codebooks, config.codebook_entries)
        noise.append(-torch.empty(shape, device=device).exponential_(generator=draws).log())
    return torch.cat(noise)
