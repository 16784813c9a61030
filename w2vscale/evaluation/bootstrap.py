"""Confidence intervals of error rates by bootstrap over utterances (Bisani & Ney 2004)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.errors import UserError

RESAMPLES = 1000  # bootstrap samples; each draws as many utterances as there are, with replacement


def confidence_interval(errors: Sequence[int], references: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of an error rate, from the errors and the reference length of each utterance."""
    samples = _bootstrap(len(errors))
    rates = np.array(errors)[samples].sum(axis=1) / np.maximum(np.array(references)[samples].sum(axis=1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def relative_reduction(
    errors: Mapping[str, tuple[float, int]], baseline: Mapping[str, tuple[float, int]]
) -> tuple[float, float, float]:
    """The relative reduction of an error rate against a baseline, and its 95 % interval by paired bootstrap.

    Both sides give the errors and the reference length of each utterance. The lower bound is -inf if the baseline makes
    no errors in many samples. Raises UserError if the utterances or their reference lengths differ.
    """
    lengths = [{name: length for name, (_, length) in side.items()} for side in (errors, baseline)]
    if lengths[0] != lengths[1]:
        raise UserError("the compared runs were evaluated on different utterances; evaluate both on the same manifest")
    ours, theirs = (np.array([side[name][0] for name in errors], dtype=np.float64) for side in (errors, baseline))

    def reduction(samples: Any) -> Any:
        our_errors, baseline_errors = ours[samples].sum(axis=-1), theirs[samples].sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(our_errors == baseline_errors, 0.0, 1.0 - our_errors / baseline_errors)

    low, high = np.percentile(reduction(_bootstrap(len(ours))), [2.5, 97.5], method="nearest")
    return float(reduction(slice(None))), float(low), float(high)


def _bootstrap(utterances: int) -> NDArray[np.int64]:
    """Positions of the utterances of each bootstrap sample."""
    return np.random.default_rng(0).integers(0, utterances, (RESAMPLES, utterances))
