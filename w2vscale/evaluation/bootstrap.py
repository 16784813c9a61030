"""Intervals of error rates by bootstrap over utterances (Bisani & Ney 2004)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from w2vscale.errors import UserError

RESAMPLES = 1000
"""Draws of as many utterances as there are, with replacement."""


def interval(errors: Sequence[int], references: Sequence[int]) -> tuple[float, float]:
    """Of 95 %, of the errors of all utterances by the lengths of their references."""
    drawn = np.random.default_rng(0).integers(0, len(errors), (RESAMPLES, len(errors)))
    rates = np.array(errors)[drawn].sum(axis=1) / np.maximum(np.array(references)[drawn].sum(axis=1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def relative_reduction(
    errors: Mapping[str, tuple[float, int]], baseline: Mapping[str, tuple[float, int]]
) -> tuple[float, float, float]:
    """How much lower an error rate is, relative to the baseline's, and its interval of 95 %.

    Both give each utterance's errors and length of reference. The interval is by paired bootstrap: the same draws of
    utterances for both. Where a baseline has hardly any errors, draws without one leave it without a lower bound: it is
    -inf.

    Raises:
        UserError: they are of different utterances, or of different references.
    """
    lengths = [{name: length for name, (_, length) in side.items()} for side in (errors, baseline)]
    if lengths[0] != lengths[1]:
        raise UserError("the runs that are compared have not written the same utterances: evaluate both again")
    ours, theirs = (np.array([side[name] for name in errors], dtype=np.float64) for side in (errors, baseline))
    drawn = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))

    def reduction(rows: Any) -> Any:
        made, baseline_made = (side[rows][..., 0].sum(axis=-1) for side in (ours, theirs))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(made == baseline_made, 0.0, 1.0 - made / baseline_made)

    low, high = np.percentile(reduction(drawn), [2.5, 97.5], method="nearest")
    return float(reduction(slice(None))), float(low), float(high)
