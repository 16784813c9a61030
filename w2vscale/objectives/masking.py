"""Which frames are masked and which are negatives: draws of wav2vec 2.0's pretext task (numpy, on the CPU).

Baevski et al. 2020, section 3.1 and appendix; fairseq `compute_mask_indices` and `sample_negatives`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from w2vscale.config.tree import ModelConfig


def span_mask(
    size: int, *, probability: float, length: int, min_spans: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Which of an utterance's frames (or channels) are masked, [size] bool.

    The number of spans is `probability * size / length`, rounded up with the probability of its fraction, and at least
    `min_spans`. Starts are drawn without replacement from [0, size - length); spans may overlap. Where there is no room
    for that nothing is masked.
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


def frame_mask(frames: int, config: ModelConfig, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Masked frames of one utterance; one that is too short has none, and so no weight in pretraining's loss."""
    return span_mask(
        frames,
        probability=config.mask_probability,
        length=config.mask_length,
        min_spans=config.mask_min_spans,
        generator=generator,
    )


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
