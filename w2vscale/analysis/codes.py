"""How often the discrete codes of a model occur with each class of frames: with each character, or each speaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.analysis.alignment import align, fill_blanks
from w2vscale.data.vocabulary import SPACE

REACH = 2  # a frame belongs to a character if the probe marks the character at most this many frames away
SILENCE = "·"  # the class of a frame that belongs to no character


@dataclass(frozen=True)
class Cooccurrence:
    """The number of frames of each class and code."""

    classes: list[str]
    frames_CV: NDArray[np.int64]
    by_chance: float = 0.0  # the information that remains when the codes are shuffled over the frames

    @property
    def information(self) -> float:
        """Mutual information of codes and classes divided by the entropy of the classes (the uncertainty coefficient):
        0 if they are independent, 1 if the code determines the class."""
        joint_CV = self.frames_CV / max(self.frames_CV.sum(), 1)
        entropy = _entropy(joint_CV.sum(axis=1))
        mutual = entropy + _entropy(joint_CV.sum(axis=0)) - _entropy(joint_CV.ravel())
        return float(max(mutual, 0.0) / entropy) if entropy > 0.0 else 0.0


def cooccurrence(classes: NDArray[np.str_], codes: NDArray[np.int64], entries: int) -> Cooccurrence:
    """Count the frames of each class and code, given the class and the code (below `entries`) of each frame."""
    names, numbers = np.unique(classes, return_inverse=True)

    def count(codes: NDArray[np.int64], by_chance: float) -> Cooccurrence:
        counts = np.bincount(numbers * entries + codes, minlength=len(names) * entries)
        return Cooccurrence(names.tolist(), counts.reshape(len(names), entries), by_chance)

    return count(codes, by_chance=count(np.random.default_rng(0).permutation(codes), 0.0).information)


def frame_letters(
    log_probabilities_TV: NDArray[np.floating], labels: Sequence[int], vocabulary: Sequence[str]
) -> NDArray[np.str_]:
    """Return the character of each frame by forced alignment. The space between words counts as silence."""
    names = [SILENCE if vocabulary[label] == SPACE else vocabulary[label] for label in labels]
    # Position -1, the last one, is a blank.
    return np.array([*names, SILENCE])[fill_blanks(align(log_probabilities_TV, labels), REACH)]


def _entropy(probabilities: NDArray[np.floating]) -> float:
    return float(torch.special.entr(torch.from_numpy(probabilities)).sum())
