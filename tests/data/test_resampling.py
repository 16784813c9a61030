"""Resampling of audio streams: the same for any blocks as at once, and odd rates in little memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lhotse.augmentation.resample import resample

from tests.helpers.audio import noise, tone
from w2vscale.data import resampling


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_in_blocks_is_resampling_at_once(rate: int) -> None:
    waveform = noise(3.0, rate=rate)
    expected = resampling.get_or_create_resampler(rate, 16_000)(torch.from_numpy(waveform)).numpy()
    for size in (7, 1000, 1_000_000):
        if size == 7:
            blocks = iter([waveform[:7], waveform[7:14], waveform[14:]])
        else:
            blocks = (waveform[start : start + size] for start in range(0, waveform.size, size))
        found = np.concatenate(list(resampling.resampled(blocks, rate, 16_000)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_odd_rates_have_the_filter_of_others(rate: int) -> None:
    waveform = noise(3.0, rate=rate)
    divisor = math.gcd(rate, 16_000)
    steps, target_steps = rate // divisor, 16_000 // divisor
    found = resampling._interpolated(waveform, resampling._filters(steps, target_steps), steps)
    # In double precision; in single, Lhotse's filters for 11,025 and its multiples are wrong by up to 1e-5.
    expected = resample(torch.from_numpy(waveform).double(), rate, 16_000).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("rate", [11_127, 16_001, 22_254, 192_001])
def test_odd_rates_take_little_memory(rate: int) -> None:
    waveform = tone(3.0, 1000.0, rate=rate)
    expected = tone(3.0, 1000.0)
    for size in (7777, 1_000_000):
        blocks = (waveform[start : start + size] for start in range(0, waveform.size, size))
        found = np.concatenate(list(resampling.resampled(blocks, rate, 16_000)))
        assert found.size == expected.size
        np.testing.assert_allclose(found[100:-100], expected[100:-100], rtol=0, atol=1e-3)
    assert resampling._filters(rate // math.gcd(rate, 16_000), 16_000 // math.gcd(rate, 16_000)).nbytes < 10e6
