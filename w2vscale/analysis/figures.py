"""Figures by matplotlib without pyplot, which keeps global state and may need a display; those of probe results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from w2vscale.errors import UserError
from w2vscale.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from w2vscale.analysis.codes import Cooccurrence

FORMATS = ("jpg", "pdf", "png", "svg")  # matplotlib knows more, but runs LaTeX for one of them
MAX_CLASSES = 40  # rows of a map; classes with the fewest frames are left out
MAX_LIFT = 3.0  # range of the colours, in log2: from an eighth to eight times the average


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure; its size is in inches."""
    from matplotlib.figure import Figure  # takes a second, and most commands draw nothing

    return Figure(figsize=(width, height))


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure to a file whose suffix names the format. Raises UserError if it is unknown, or writing fails."""
    file_format = output.suffix.removeprefix(".").lower()
    if file_format not in FORMATS:
        raise UserError(f"{output}: not the name of an image file; use one of the suffixes .{', .'.join(FORMATS)}")
    figure.tight_layout()
    with new_file(output, "wb") as file:
        figure.savefig(file, format=file_format, dpi=110)


def plain(text: str) -> str:
    """Escape a text that matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def add_grid(axes: Axes) -> None:
    """Add a light grid in place of the upper and right border."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_layers(axes: Axes, of_models: Mapping[str, Mapping[int, float]], *, log_mel: float | None = None) -> None:
    """Plot a value of the probes of each layer: a curve per model, and a line for log-mel features."""
    for name, of_layers in of_models.items():
        layers = list(of_layers)
        axes.plot(layers, list(of_layers.values()), marker="o", linewidth=1.3, markersize=4, label=plain(name))
        axes.set_xticks(layers)
    if log_mel is not None:
        axes.axhline(log_mel, color="gray", linestyle="--", linewidth=1.0, label="log-mel features")
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("layer (0: input of the first block)")
    add_grid(axes)


def draw_layers(error_rates: Mapping[str, Mapping[int, float]], output: Path, *, log_mel: float | None = None) -> None:
    """Draw the label error rates of the probes of each layer, by `plot_layers`."""
    figure = new_figure(width=7, height=3.5)
    axes = figure.subplots()
    plot_layers(axes, error_rates, log_mel=log_mel)
    axes.set_ylabel("label error rate of a linear probe")
    save_figure(figure, output)


def draw_codes(codebooks: Sequence[Cooccurrence], output: Path, *, title: str) -> None:
    """Draw a map of log2 P(class | code) / P(class) for each codebook: a row per class, a column per entry in use.

    Columns are sorted by the class that contributes most to the information of the code, so that codes that stand for
    classes form a diagonal.
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
        axes.set_yticks(range(rows), [plain(found.classes[row]) for row in shown], fontsize="x-small")
        axes.set_xticks([])
        axes.set_xlabel(f"{shares_CV.shape[1]} of {found.frames_CV.shape[1]} entries of codebook {number}")
        figure.colorbar(image, ax=axes, label=f"log2 P({title} | code) / P({title})", pad=0.01)
    save_figure(figure, output)
