"""Metrics of fine-tuning from its sums."""

from __future__ import annotations

import math

from w2vscale.objectives.ctc import CtcSums


def ctc_metrics(sums: CtcSums) -> dict[str, float]:
    """Figures per label from sums over any number of micro-batches (and ranks); NaN where there is no label.

    `loss` in nats; `label_error_rate` of the greedy labels, spaces included: 0 in training, where nothing is decoded.
    """
    labels = float(sums.labels) or math.nan
    return {
        "loss": float(sums.total) / labels,
        "label_error_rate": float(sums.errors) / labels,
        "labels": float(sums.labels),
    }
