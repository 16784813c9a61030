"""Which frames and channels are masked, drawn on the CPU with NumPy.

Baevski et al. 2020, section 3.1 and appendix; fairseq `compute_mask_indices`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from w2vscale.config.tree import Count
from w2vscale.data.inputs import AudioBatch
from w2vscale.objectives.base import ObjectiveSettings


class MaskSettings(ObjectiveSettings):
    """How spans of frames are masked."""

    mask_probability: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.65, description="expected share of frames in spans, counted before they overlap"
    )
    mask_length: Count = Field(10, description="frames of one span")
    mask_min_spans: Count = Field(2, description="smallest number of spans in an utterance")

    @property
    def shortest_frames(self) -> int:
        """Frames of the shortest utterance with room for its spans."""
        return self.mask_length + self.mask_min_spans


def span_mask(
    size: int, *, probability: float, length: int, min_spans: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Which frames (or channels) of an utterance are masked, [size] bool.

    The number of spans is `probability * size / length`, rounded up with the probability of its fraction, and at least
    `min_spans`. Starts are drawn without replacement from [0, size - length); spans may overlap. Where there is no room
    for them nothing is masked.
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
    """Masked frames of one utterance; one that is too short has none."""
    return span_mask(
        frames,
        probability=settings.mask_probability,
        length=settings.mask_length,
        min_spans=settings.mask_min_spans,
        generator=generator,
    )


def mask_frames(
    audio: AudioBatch, places: Sequence[int], settings: MaskSettings, rng: Callable[[int], np.random.Generator]
) -> list[np.random.Generator]:
    """Draw the masks of all utterances into `audio.mask_BT`; returns their generators, for further draws."""
    generators = [rng(place) for place in places]
    masks_BT, frames_B = audio.mask_BT.numpy(), audio.frames_B.tolist()
    # Without utterances there is a row of silence, which is not masked.
    for mask_T, frames, draws in zip(masks_BT, frames_B, generators, strict=False):
        mask_T[:frames] = frame_mask(frames, settings, draws)
    return generators
