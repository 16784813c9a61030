"""Masks of frames and channels, drawn on the CPU with NumPy.

Sources: Baevski et al. 2020, section 3.1 and appendix; `compute_mask_indices` in fairseq's data_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.config import ModelConfig
from w2vscale.data.inputs import AudioBatch, Utterance, audio_batch
from w2vscale.data.randomness import Generators
from w2vscale.models.lengths import input_samples
from w2vscale.objectives.settings import MaskSettings


class Spans(NamedTuple):
    """How frames (or channels) are masked."""

    probability: float  # expected fraction in spans, counted before they overlap
    length: int
    least: int  # minimum number of spans


def span_mask(size: int, spans: Spans, rounding: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw which frames (or channels) of an utterance are masked. Returns [size] bool.

    The number of spans is `probability * size / length`, rounded up if its fractional part and `rounding`, from [0, 1),
    add up to 1; but at least `least`. Starts are drawn without replacement from [0, size - length), and spans may
    overlap. If there are not more starts than spans, they are drawn from [0, number of spans], and spans are cut at
    the end of the utterance.
    """
    count = max(int(spans.probability * size / spans.length + rounding), spans.least)
    starts = max(size - spans.length, count + 1)
    first = generator.permutation(starts)[:count]
    places = (first[:, None] + np.arange(spans.length)).reshape(-1)
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
    sizes: Sequence[int],
    spans: Spans,
    generators: Sequence[np.random.Generator],
    *,
    trimmed: bool,
    one_rounding: bool = True,
) -> list[NDArray[np.bool_]]:
    """Draw the masks of the utterances of a micro-batch, [size] bool each.

    `trimmed`: as fairseq does (`MaskSettings.mask_trim`). Then the numbers of spans of all utterances are rounded with
    one draw, unless `one_rounding` is false.
    """
    roundings = [generator.random() for generator in generators]
    if trimmed and one_rounding:
        roundings = roundings[:1] * len(roundings)
    draws = zip(sizes, roundings, generators, strict=True)
    masks = [span_mask(size, spans, rounding, generator) for size, rounding, generator in draws]
    return trim(masks, generators) if trimmed else masks


def masked_batch(
    utterances: Sequence[Utterance],
    model: ModelConfig,
    settings: MaskSettings,
    *,
    rng: Generators,
    width: int,
    one_rounding: bool = True,
) -> tuple[AudioBatch, list[np.random.Generator]]:
    """Pad utterances (or one of silence, if there are none) and draw masks; also return the generator of each."""
    silence = np.zeros(input_samples(settings.shortest_frames, model), dtype=np.float32)
    audio = audio_batch([utterance.waveform for utterance in utterances] or [silence], model, width=width)
    generators = [rng(utterance.place) for utterance in utterances]
    spans = Spans(settings.mask_probability, settings.mask_length, settings.mask_min_spans)
    frames, trimmed = audio.frames[: len(generators)], settings.mask_trim == "micro_batch"
    masks = draw_masks(frames, spans, generators, trimmed=trimmed, one_rounding=one_rounding)
    for row, mask in enumerate(masks):
        audio.mask_BT[row, : mask.size] = torch.from_numpy(mask)
    return audio, generators
