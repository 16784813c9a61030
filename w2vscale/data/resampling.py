"""Resampling of cuts when their audio is loaded, and of audio streams block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from lhotse.augmentation import Resample, get_or_create_resampler
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from numpy.lib.stride_tricks import sliding_window_view

from w2vscale.data.decoding import Samples

MAX_DENSE_STEPS = 1000  # largest `steps` for which Lhotse's filters are used; their memory grows with its square


@dataclass
class SincResample(Resample):
    """Lhotse's `Resample` with the windowed-sinc filter that Lhotse copied from torchaudio.

    Lhotse uses this copy only if torchaudio is installed. Otherwise it calls SciPy, which it does not require and
    which gives different samples.
    """

    def __call__(self, samples: Samples, sampling_rate: int | None = None) -> Samples:
        divisor = math.gcd(self.source_sampling_rate, self.target_sampling_rate)
        steps, target_steps = self.source_sampling_rate // divisor, self.target_sampling_rate // divisor
        if steps > MAX_DENSE_STEPS:
            filters = _filters(steps, target_steps)
            changed = np.stack([_interpolated(channel, filters, steps) for channel in samples])
        elif self.resampler is None:  # LHOTSE_RESAMPLING_BACKEND=sox
            changed = super().__call__(samples, sampling_rate)
        else:
            changed = self.resampler(torch.from_numpy(samples)).numpy()
        return changed


def at_rate(cut: Cut, sampling_rate: int) -> Cut:
    """`cut`, resampled to `sampling_rate` (Hz) when its audio is loaded, whether or not torchaudio is installed."""
    if cut.sampling_rate != sampling_rate:
        cut = cut.resample(sampling_rate)
    if not cut.recording.transforms:
        return cut
    transforms = [
        SincResample(change.source_sampling_rate, change.target_sampling_rate) if type(change) is Resample else change
        for change in cut.recording.transforms
    ]
    return fastcopy(cut, recording=fastcopy(cut.recording, transforms=transforms))


def resampled(blocks: Iterator[Samples], rate: int, target_rate: int) -> Iterator[Samples]:
    """Resample a signal of any length block by block, from `rate` to `target_rate` (Hz), in bounded memory.

    The result does not depend on the blocks: it equals resampling the whole signal at once.
    """
    if rate == target_rate:
        yield from blocks
        return
    divisor = math.gcd(rate, target_rate)
    steps, target_steps = rate // divisor, target_rate // divisor
    resample, width = _resampler(steps, target_steps)
    # The filter needs `width` samples on either side; multiples of `steps` preserve its phase.
    context = steps * -(-width // steps)

    def convert(signal: Samples, samples: int) -> Samples:
        """Resample a signal and return the result of the `samples` samples after the first `context`."""
        start = context // steps * target_steps
        count = -(-samples * target_steps // steps)
        return resample(signal)[start : start + count]

    silence = held = np.zeros(context, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        ready = (held.size - 2 * context) // steps * steps
        if ready > 0:
            yield convert(held[: ready + 2 * context], ready)
            held = held[ready:]
    yield convert(np.concatenate([held, silence]), held.size - context)


def _resampler(steps: int, target_steps: int) -> tuple[Callable[[Samples], Samples], int]:
    """A function that converts every `steps` samples to `target_steps`, and the samples it needs on either side."""
    if steps <= MAX_DENSE_STEPS:
        dense = get_or_create_resampler(steps, target_steps)
        return lambda signal: dense(torch.from_numpy(signal)).numpy(), dense.width
    filters = _filters(steps, target_steps)
    return lambda signal: _interpolated(signal, filters, steps), filters.shape[1] // 2


def _interpolated(signal: Samples, filters: Samples, steps: int) -> Samples:
    """Resample a signal: every `steps` samples become one sample per filter [target_steps, taps]."""
    target_steps, taps = filters.shape
    neighbours = sliding_window_view(np.pad(signal, taps // 2), taps)
    resampled = np.empty(-(-signal.size * target_steps // steps), np.float32)
    size = 2**18 // taps
    for start in range(0, resampled.size, size):
        positions = np.arange(start, min(start + size, resampled.size))
        found = neighbours[positions * steps // target_steps + 1]
        resampled[positions] = np.einsum("nt,nt->n", found, filters[positions % target_steps])
    return resampled


@lru_cache(maxsize=4)
def _filters(steps: int, target_steps: int) -> Samples:
    """The filter of each of `target_steps` output samples, applied to the samples around it [target_steps, taps].

    The windowed sinc of torchaudio and Lhotse, whose own table also has a column for each of the `steps` samples.
    """
    zero_crossings, rolloff = 6, 0.99
    cutoff = rolloff * min(steps, target_steps) / steps
    width = math.ceil(zero_crossings / cutoff)
    fraction = np.arange(target_steps) * steps % target_steps / target_steps
    times = cutoff * (np.arange(1 - width, width + 1) - fraction[:, None])
    window = np.cos(np.pi / 2 * np.clip(times / zero_crossings, -1, 1)) ** 2
    filters: Samples = (cutoff * window * np.sinc(times)).astype(np.float32)
    return filters
