"""CTC forced alignment: the most probable path through given labels (Graves et al. 2006, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from w2vscale.objectives.ctc import BLANK


def align(log_probabilities_TV: NDArray[np.floating], labels: Sequence[int]) -> NDArray[np.int64]:
    """Align labels (without blanks) with frames by dynamic programming (Viterbi).

    Returns the most probable path [T] that collapses to them: for each frame a position in `labels`, or -1 for blank.
    Raises ValueError if there are too few frames for the labels and the blanks between equal neighbours.
    """
    frames = len(log_probabilities_TV)
    symbols = np.full(2 * len(labels) + 1, BLANK)
    symbols[1::2] = labels
    states = len(symbols)
    # The blank between two labels may be skipped if they differ.
    skips = np.full(states, -np.inf)
    skips[3::2] = np.where(symbols[3::2] != symbols[1:-2:2], 0.0, -np.inf)
    best = np.full(states, -np.inf)
    best[:2] = log_probabilities_TV[0, symbols[:2]]
    steps = np.zeros((frames, states), dtype=np.int8)
    for frame in range(1, frames):
        reached = np.full((3, states), -np.inf)
        reached[0] = best
        reached[1, 1:] = best[:-1]
        reached[2, 2:] = best[:-2] + skips[2:]
        steps[frame] = reached.argmax(axis=0)
        best = reached.max(axis=0) + log_probabilities_TV[frame, symbols]
    ends = [states - 1, states - 2] if labels else [0]
    state = max(ends, key=lambda end: best[end])
    if best[state] == -np.inf:
        raise ValueError(f"{frames} frames are too few for {len(labels)} labels")
    path = np.empty(frames, dtype=np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state // 2 if state % 2 else -1
        state -= int(steps[frame, state])
    return path


def fill_blanks(path: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """Assign blank frames of a path to the nearest label within `reach` frames; to the earlier one if two are equal.

    CTC marks a label in only one or two of its frames.
    """
    labelled = np.flatnonzero(path >= 0)
    if not labelled.size:
        return path
    frames = np.arange(path.size)
    after = labelled[np.searchsorted(labelled, frames).clip(max=labelled.size - 1)]
    before = labelled[(np.searchsorted(labelled, frames, side="right") - 1).clip(min=0)]
    nearest = np.where(np.abs(after - frames) < np.abs(frames - before), after, before)
    return np.where(np.abs(nearest - frames) <= reach, path[nearest], -1)
