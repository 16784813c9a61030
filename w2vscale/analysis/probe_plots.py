"""Plots of probe results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from w2vscale.analysis.figures import new_figure, save_figure
from w2vscale.analysis.probing import Cooccurrence

MAX_CLASSES = 40
"""The number of rows of a map. Classes with the fewest frames are left out."""

MAX_LIFT = 3.0
"""The range of the colours, in log2: from an eighth to eight times the average."""


def draw_layers(error_rates: Mapping[int, float], output: Path) -> None:
    """Draw the label error rate of the probe of each layer.

    Raises:
        UserError: the file cannot be written.
    """
    figure = new_figure(width=7, height=3.5)
    axes = figure.subplots()
    axes.plot(list(error_rates), list(error_rates.values()), marker="o", linewidth=1.3, markersize=4)
    axes.set_xticks(list(error_rates))
    axes.set_xlabel("layer (0: input of the first block)")
    axes.set_ylabel("label error rate of a linear probe")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, output)


def draw_codes(codebooks: Sequence[Cooccurrence], output: Path, *, title: str) -> None:
    """Draw a map of log2 P(class | code) / P(class) for each codebook: a row per class, a column per entry in use.

    Columns are sorted by the class that contributes most to the information of the code, so that codes that stand for
    classes form a diagonal.

    Raises:
        UserError: the file cannot be written.
    """
    rows = min(len(codebooks[0].classes), MAX_CLASSES)
    figure = new_figure(width=11, height=len(codebooks) * (1.0 + 0.16 * rows))
    all_axes = figure.subplots(len(codebooks), 1, squeeze=False)
    for number, (found, axes) in enumerate(zip(codebooks, all_axes[:, 0], strict=True)):
        shown = np.sort(np.argsort(-found.frames_CV.sum(axis=1), kind="stable")[:rows])
        used = found.frames_CV[shown].sum(axis=0) > 0
        shares_CV = found.frames_CV[shown][:, used] / found.frames_CV[:, used].sum(axis=0)
        overall_C1 = found.frames_CV[shown].sum(axis=1, keepdims=True) / found.frames_CV.sum()
        lift_CV = np.log2(np.maximum(shares_CV / overall_C1, 2.0**-MAX_LIFT))
        information_CV = shares_CV * lift_CV
        order = np.lexsort((-information_CV.max(axis=0), information_CV.argmax(axis=0)))
        image = axes.imshow(
            lift_CV[:, order], aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-MAX_LIFT, vmax=MAX_LIFT
        )
        axes.set_yticks(range(rows), [found.classes[row] for row in shown], fontsize="x-small")
        axes.set_xticks([])
        axes.set_xlabel(f"{shares_CV.shape[1]} of {found.frames_CV.shape[1]} entries of codebook {number}")
        figure.colorbar(image, ax=axes, label=f"log2 P({title} | code) / P({title})", pad=0.01)
    save_figure(figure, output)
