"""Masks of frames and channels, drawn on the CPU with NumPy.

Sources: Baevski et al. 2020, section 3.1 and appendix; `compute_mask_indices` in fairseq's data_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

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
    mask_trim: Literal["none", "micro_batch"] = Field(
        "none",
        description="micro_batch: unmask single frames and channels at random until all utterances of a micro-batch "
        "have equally many masked, as fairseq does; none: keep whole spans",
    )

    @property
    def shortest_frames(self) -> int:
        """Minimum number of frames of an utterance of which at least `mask_min_spans` are always masked."""
        return self.mask_min_spans + 1


def span_mask(
    size: int, *, probability: float, length: int, min_spans: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw which frames (or channels) of an utterance are masked. Returns [size] bool.

    The number of spans is `probability * size / length`, rounded up with a probability equal to its fractional part,
    but at least `min_spans`. Starts are drawn without replacement from [0, size - length), and spans may overlap. If
    there are not more starts than spans, they are drawn from [0, spans], and spans end with the utterance.
    """
    spans = max(int(probability * size / length + generator.random()), min_spans)
    starts = max(size - length, spans + 1)
    first = generator.permutation(starts)[:spans]
    places = (first[:, None] + np.arange(length)).reshape(-1)
    mask = np.zeros(size, dtype=np.bool_)
    mask[places[places < size]] = True
    return mask


def trim(masks: Sequence[NDArray[np.bool_]], generators: Sequence[np.random.Generator]) -> list[NDArray[np.bool_]]:
    """Unmask random frames (or channels) of each mask until all masks have as many as the smallest one."""
    smallest = min((int(mask.sum()) for mask in masks), default=0)
    trimmed = [np.zeros_like(mask) for mask in masks]
    for mask, kept, generator in zip(masks, trimmed, generators, strict=True):
        kept[generator.choice(np.flatnonzero(mask), smallest, replace=False)] = True
    return trimmed


def draw_masks(
    sizes: Sequence[int], settings: MaskSettings, generators: Sequence[np.random.Generator], **spans: Any
) -> list[NDArray[np.bool_]]:
    """Draw the masks of the utterances of a micro-batch, [size] bool each. `spans` are arguments of `span_mask`."""
    masks = [span_mask(size, generator=draws, **spans) for size, draws in zip(sizes, generators, strict=True)]
    return trim(masks, generators) if settings.mask_trim == "micro_batch" else masks


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
    masks = draw_masks(
        audio.frames[: len(generators)],
        settings,
        generators,
        probability=settings.mask_probability,
        length=settings.mask_length,
        min_spans=settings.mask_min_spans,
    )
    for row, mask in enumerate(masks):
        audio.mask_BT[row, : mask.size] = torch.from_numpy(mask)
    return audio, generators
