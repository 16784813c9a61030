"""Random numbers of a run: every draw is a pure function of (seed, stream, numbers)."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

Generators = Callable[[int], np.random.Generator]  # gives the generator of the utterance at a place in a micro-batch


class Stream(IntEnum):
    """Purpose of a draw. Append new values and never renumber: reproducibility depends on them."""

    EPOCH_ORDER = 0
    BUCKET_ORDER = 1
    CROP = 2
    MASK = 3
    GUMBEL = 4
    DROPOUT = 5
    LAYERDROP = 6
    INITIALISATION = 7
    MIX = 8
    AUGMENTATION = 9
    SHARDS = 10
    SUBSET = 11
    SHARD_ORDER = 12
    BLOCK = 13


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """Create a counter-based generator for one purpose; equal arguments give equal draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, *numbers))))


def derived_seed(seed: int, stream: Stream, *numbers: int) -> int:
    """Derive a 63-bit seed for generators other than NumPy's."""
    words = np.random.SeedSequence(seed, spawn_key=(stream, *numbers)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
