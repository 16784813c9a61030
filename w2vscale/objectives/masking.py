"""Masks of frames and channels, drawn on the CPU with NumPy.

Sources: Baevski et al. 2020, section 3.1 and appendix; fairseq `compute_mask_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from w2vscale.config import ModelConfig
from w2vscale.config.tree import Count
from w2vscale.data.inputs import AudioBatch, Utterance, audio_batch
from w2vscale.data.randomness import Generators
from w2vscale.models.lengths import input_samples
from w2vscale.objectives.base import ObjectiveSettings


class MaskSettings(ObjectiveSettings):
    """Settings of masks over spans of frames."""

    mask_probability: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.65, description="expected fraction of frames in masked spans, counted before they overlap"
    )
    mask_length: Count = Field(10, description="length of a masked span, in frames")
    mask_min_spans: Count = Field(2, description="minimum number of masked spans per utterance")

    @property
    def shortest_frames(self) -> int:
        """Minimum number of frames of an utterance that has room for `mask_min_spans` spans."""
        return self.mask_length + self.mask_min_spans


def span_mask(
    size: int, *, probability: float, length: int, min_spans: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw which frames (or channels) of an utterance are masked. Returns [size] bool.

    The number of spans is `probability * size / length`, rounded up with a probability equal to its fractional part,
    but at least `min_spans`. Starts are drawn without replacement from [0, size - length), and spans may overlap. If
    there is no room for the spans, nothing is masked.
    """
    mask = np.zeros(size, dtype=np.bool_)
    starts = size - length
    if starts < max(min_spans, 1):
        return mask
    spans = int(probability * size / length + generator.random())
    spans = min(max(spans, min_spans), starts)
    first = generator.permutation(starts)[:spans]
    mask[(first[:, None] + np.arange(length)).reshape(-1)] = True
    return mask


def frame_mask(frames: int, settings: MaskSettings, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the mask of one utterance, [frames] bool. If it is too short, nothing is masked."""
    return span_mask(
        frames,
        probability=settings.mask_probability,
        length=settings.mask_length,
        min_spans=settings.mask_min_spans,
        generator=generator,
    )


def masked_batch(
    utterances: Sequence[Utterance],
    model: ModelConfig,
    settings: MaskSettings,
    *,
    rng: Generators,
    width: int,
) -> tuple[AudioBatch, list[np.random.Generator]]:
    """Pad utterances (or one of silence, if there are none) and draw masks; also return the generator of each."""
    silence = np.zeros(input_samples(settings.shortest_frames, model), dtype=np.float32)
    audio = audio_batch([utterance.waveform for utterance in utterances] or [silence], model, width=width)
    generators = [rng(utterance.place) for utterance in utterances]
    for row, draws in enumerate(generators):
        frames = int(audio.frames_B[row])
        audio.mask_BT[row, :frames] = torch.from_numpy(frame_mask(frames, settings, draws))
    return audio, generators
