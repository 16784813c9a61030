"""Which frames are masked and which are negatives: draws of wav2vec 2.0's pretext task (numpy, on the CPU).

Baevski et al. 2020, section 3.1 and appendix; fairseq `compute_mask_indices` and `sample_negatives`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from w2vscale.config.tree import ModelConfig


def span_mask(frames: int, config: ModelConfig, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Masked frames of one utterance, [frames] bool.

    The number of spans is `mask_probability * frames / mask_length`, rounded up with the probability of its
    fraction, and at least `mask_min_spans`. Starts are drawn without replacement from [0, frames - mask_length);
    spans may overlap. An utterance too short for that has no masked frame, and so no weight in the loss.
    """
    mask = np.zeros(frames, dtype=np.bool_)
    starts = frames - config.mask_length
    if starts < config.mask_min_spans:
        return mask
    spans = int(config.mask_probability * frames / config.mask_length + generator.random())
    spans = min(max(spans, config.mask_min_spans), starts)
    first = generator.permutation(starts)[:spans]
    mask[(first[:, None] + np.arange(config.mask_length)).reshape(-1)] = True
    return mask


def negative_indices(masked: int, negatives: int, generator: np.random.Generator) -> NDArray[np.integer]:
    """For each masked frame of one utterance, which of the others are its negatives: [masked, negatives].

    Uniform with replacement over the other masked frames: drawn in [0, masked - 1), one more from the own index on.
    """
    if masked < 2:
        return np.zeros((masked, negatives), dtype=np.int16)
    # Small, since they travel from the loader's processes.
    dtype = np.int16 if masked <= np.iinfo(np.int16).max else np.int32
    drawn = generator.integers(0, masked - 1, size=(masked, negatives), dtype=dtype)
    own: NDArray[np.int32] = np.arange(masked, dtype=np.int32)[:, None]
    return drawn + (drawn >= own)
