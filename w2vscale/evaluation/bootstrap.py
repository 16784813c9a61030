"""Confidence intervals of error rates by bootstrap over utterances (Bisani & Ney 2004)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.errors import UserError

RESAMPLES = 1000  # bootstrap samples; each draws as many utterances as there are, with replacement


def confidence_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The 95 % interval of an error rate, from the errors and the reference length of each utterance."""
    errors, references = np.array(counts)[_bootstrap(len(counts))].sum(axis=1).T
    low, high = np.percentile(errors / np.maximum(references, 1), [2.5, 97.5])
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


def describe_reduction(
    name: str, errors: Mapping[str, tuple[float, int]], baseline: Mapping[str, tuple[float, int]]
) -> str:
    """Format the relative reduction of the error rate `name` and its interval; see `relative_reduction`."""
    if not any(wrong for wrong, _ in baseline.values()):
        return f"{name} not comparable (the baseline makes no errors)"
    value, low, high = relative_reduction(errors, baseline)
    if value >= 0.0:
        return f"{name} lower by {value:.1%} (95 %: {_bound(low)} to {_bound(high)})"
    return f"{name} higher by {-value:.1%} (95 %: {_bound(0.0 - high)} to {_bound(0.0 - low)})"


def _bound(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "no bound"


def _bootstrap(utterances: int) -> NDArray[np.int64]:
    """Positions of the utterances of each bootstrap sample."""
    return np.random.default_rng(0).integers(0, utterances, (RESAMPLES, utterances))
