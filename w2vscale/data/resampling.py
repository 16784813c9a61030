"""Lhotse's lazy resampling, the same whether torchaudio is installed or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from lhotse.augmentation import AudioTransform, Resample
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from numpy.typing import NDArray


@dataclass
class SincResample(Resample):
    """Lhotse's `Resample` with the windowed-sinc filter that Lhotse copied from torchaudio.

    Lhotse uses its copy only where torchaudio is installed. Elsewhere it calls SciPy, which it does not require and
    which gives other samples.
    """

    def __call__(self, samples: NDArray[np.float32], sampling_rate: int | None = None) -> NDArray[np.float32]:
        if self.resampler is None:  # LHOTSE_RESAMPLING_BACKEND=sox
            changed: NDArray[np.float32] = super().__call__(samples, sampling_rate)
        else:
            changed = self.resampler(torch.from_numpy(samples)).numpy()
        return changed


def at_rate(cut: Cut, sampling_rate: int) -> Cut:
    """`cut`, resampled to `sampling_rate` (Hz) when its audio is loaded."""
    if cut.sampling_rate != sampling_rate:
        cut = cut.resample(sampling_rate)
    recording = cut.recording
    if not recording.transforms:
        return cut
    transforms = [_independent(transform) for transform in recording.transforms]
    return fastcopy(cut, recording=fastcopy(recording, transforms=transforms))


def _independent(transform: AudioTransform) -> AudioTransform:
    if type(transform) is Resample:
        return SincResample(transform.source_sampling_rate, transform.target_sampling_rate)
    return transform
