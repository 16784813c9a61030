"""Pictures of what probes find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from w2vscale.analysis.figures import import_pyplot, save_figure
from w2vscale.analysis.probing import Cooccurrence

MOST_CLASSES = 40
"""Rows of a picture: those with most frames."""

MOST_LIFT = 3.0
"""The end of the colours: eight times as often as over all codes, or an eighth."""


def draw_layers(error_rates: Mapping[int, float], output: Path) -> None:
    """The label error rate of each layer's probe.

    Raises:
        UserError: the file cannot be written.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(list(error_rates), list(error_rates.values()), marker="o", linewidth=1.3, markersize=4)
    axes.set_xticks(list(error_rates))
    axes.set_xlabel("layer (0: the first block's input)")
    axes.set_ylabel("label error rate of a linear probe")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, output)


def draw_codes(codebooks: Sequence[Cooccurrence], output: Path, *, title: str) -> None:
    """Of each codebook a map of log2 P(class | code) / P(class): a row per class, a column per entry in use.

    Columns are sorted by the class that they tell most of, so that codes which stand for classes make a diagonal.

    Raises:
        UserError: the file cannot be written.
    """
    pyplot = import_pyplot()
    rows = min(len(codebooks[0].classes), MOST_CLASSES)
    figure, all_axes = pyplot.subplots(
        len(codebooks), 1, figsize=(11, len(codebooks) * (1.0 + 0.16 * rows)), squeeze=False
    )
    for number, (found, axes) in enumerate(zip(codebooks, all_axes[:, 0], strict=True)):
        shown = np.sort(np.argsort(-found.frames_CV.sum(axis=1), kind="stable")[:rows])
        used = found.frames_CV[shown].sum(axis=0) > 0
        shares_CV = found.frames_CV[shown][:, used] / found.frames_CV[:, used].sum(axis=0)
        overall_C1 = found.frames_CV[shown].sum(axis=1, keepdims=True) / found.frames_CV.sum()
        lift_CV = np.log2(np.maximum(shares_CV / overall_C1, 2.0**-MOST_LIFT))
        told_CV = shares_CV * lift_CV
        order = np.lexsort((-told_CV.max(axis=0), told_CV.argmax(axis=0)))
        image = axes.imshow(
            lift_CV[:, order], aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-MOST_LIFT, vmax=MOST_LIFT
        )
        axes.set_yticks(range(rows), [found.classes[row] for row in shown], fontsize="x-small")
        axes.set_xticks([])
        axes.set_xlabel(f"{shares_CV.shape[1]} of {found.frames_CV.shape[1]} entries of codebook {number}")
        figure.colorbar(image, ax=axes, label=f"log2 P({title} | code) / P({title})", pad=0.01)
    save_figure(figure, output)
