"""Draw the results of run.sh: the loss of the linear probes by layer, and the error rates after fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from w2vscale.analysis.figures import add_grid, new_figure, plain, plot_layers, save_figure
from w2vscale.errors import UserError
from w2vscale.evaluation.results import read_results

GRAY = "0.6"


def draw_probes(axes: Axes, probes: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Draw a curve over the layers for each model, one for random weights, and a line for log-mel features."""
    _, first = probes[0]
    measured = {**dict(probes), "random weights": first["random"]}
    losses = {name: {int(layer): loss for layer, loss in one["ctc_loss"].items()} for name, one in measured.items()}
    plot_layers(axes, losses, log_mel=first["log_mel"]["ctc_loss"])
    axes.set_ylabel("CTC loss of a linear probe\n(nats per label)")


def draw_error_rates(axes: Axes, scores: Sequence[tuple[Path, str, dict[str, Any]]], pretrained: Sequence[str]) -> None:
    """Draw a bar with its 95 % interval for each model, in a group for each amount of transcribed speech.

    Those of `pretrained` have the colours of their probes.
    """
    colors = {name: f"C{number}" for number, name in enumerate(pretrained)}
    row, rows, names = 0, [], []
    for _, group in groupby(scores, key=lambda score: _amount(score[0])):
        for path, name, found in group:
            low, high = found["character_interval"]
            error = [[100 * max(found["cer"] - low, 0.0)], [100 * max(high - found["cer"], 0.0)]]
            axes.barh(row, 100 * found["cer"], xerr=error, color=colors.get(name, GRAY), ecolor="0.3")
            rows.append(row)
            names.append(f"{_amount(path)}, {plain(name)}")
            row += 1
        row += 1
    axes.set_yticks(rows, names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("CER after fine-tuning (%), greedy decoding")
    add_grid(axes)


def _amount(path: Path) -> str:
    """The amount of transcribed speech, from AMOUNTmin/RUN/wer_NAME.json."""
    return path.parent.parent.name.removesuffix("min") + " min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="image file to write")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE.json", help="result of a probe or of decoding")
    options = parser.parse_args()
    try:
        found = list(zip(options.results, read_results(options.results), strict=True))
    except UserError as error:
        sys.exit(f"error: {error}")
    probes = [(result.run, result.metrics) for _, result in found if "ctc_loss" in result.metrics]
    scores = [
        (path, *result) for path, result in found if "wer" in result.metrics and result.metrics["decoding"] == "greedy"
    ]
    figure = new_figure(width=10, height=3.8)
    left, right = figure.subplots(1, 2)
    draw_probes(left, probes)
    draw_error_rates(right, scores, [name for name, _ in probes])
    save_figure(figure, options.output)


if __name__ == "__main__":
    main()
