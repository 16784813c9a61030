"""Resampling of audio of any length and any sampling rate, block by block, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from lhotse.augmentation import get_or_create_resampler
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Samples = NDArray[np.float32]

DENSE_STEPS = 1000
"""Above so many samples to a period of both rates, Lhotse's filters are too large: they grow with its square."""


def resampled(blocks: Iterator[Samples], rate: int, wanted: int) -> Iterator[Samples]:
    """The blocks of a signal at another rate: what resampling all of it at once gives, whatever the blocks."""
    if rate == wanted:
        yield from blocks
        return
    divisor = math.gcd(rate, wanted)
    steps, wanted_steps = rate // divisor, wanted // divisor
    resample, width = _resampler(steps, wanted_steps)
    # The filter reaches `width` samples to either side; whole steps keep its phases.
    context = steps * -(-width // steps)

    def convert(signal: Samples, samples: int) -> Samples:
        """`samples` samples, resampled, that are between one context and another."""
        start = context // steps * wanted_steps
        count = -(-samples * wanted_steps // steps)
        return resample(signal)[start : start + count]

    silence = np.zeros(context, np.float32)
    held = silence
    for block in blocks:
        held = np.concatenate([held, block])
        ready = (held.size - 2 * context) // steps * steps
        if ready > 0:
            yield convert(held[: ready + 2 * context], ready)
            held = held[ready:]
    yield convert(np.concatenate([held, silence]), held.size - context)


def _resampler(steps: int, wanted_steps: int) -> tuple[Callable[[Samples], Samples], int]:
    """What resamples a signal, `steps` samples to `wanted_steps`, and how many samples it reaches to either side."""
    if steps <= DENSE_STEPS:
        dense = get_or_create_resampler(steps, wanted_steps)
        return lambda signal: dense(torch.from_numpy(signal)).numpy(), dense.width
    filters = _filters(steps, wanted_steps)
    return lambda signal: _interpolated(signal, filters, steps), filters.shape[1] // 2


def _interpolated(signal: Samples, filters: Samples, steps: int) -> Samples:
    """A signal resampled from `steps` samples to one of each of the filters [wanted_steps, taps]."""
    wanted_steps, taps = filters.shape
    windows = sliding_window_view(np.pad(signal, taps // 2), taps)
    resampled = np.empty(-(-signal.size * wanted_steps // steps), np.float32)
    some = 2**18 // taps
    for start in range(0, resampled.size, some):
        positions = np.arange(start, min(start + some, resampled.size))
        found = windows[positions * steps // wanted_steps + 1]
        np.einsum("nt,nt->n", found, filters[positions % wanted_steps], out=resampled[start : start + some])
    return resampled


@lru_cache(maxsize=4)
def _filters(steps: int, wanted_steps: int) -> Samples:
    """Of each of `wanted_steps` samples, the weights of those around it [wanted_steps, taps].

    The windowed sinc of torchaudio and Lhotse, whose own table has a column for each of `steps` samples.
    """
    zero_crossings, rolloff = 6, 0.99
    cutoff = rolloff * min(steps, wanted_steps) / steps
    width = math.ceil(zero_crossings / cutoff)
    fraction = np.arange(wanted_steps) * steps % wanted_steps / wanted_steps
    times = cutoff * (np.arange(1 - width, width + 1) - fraction[:, None])
    window = np.cos(np.pi / 2 * np.clip(times / zero_crossings, -1, 1)) ** 2
    filters: Samples = (cutoff * window * np.sinc(times)).astype(np.float32)
    return filters
