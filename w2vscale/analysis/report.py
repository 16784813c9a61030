"""Plot and summarise the metrics of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2vscale.analysis.figures import add_grid, new_figure, plain, save_figure
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.objectives import build_objective
from w2vscale.objectives.base import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run, and the panels in which its objective plots them."""

    exp: Path
    train: list[Record]
    validation: list[Record]
    panels: tuple[Panel, Panel, Panel]
    roll_backs: list[int]  # updates to which the run went back

    def latest(self) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """The latest training and validation metrics: the values of each panel, None where they were not measured."""
        last, validation = self.train[-1], self.validation[-1] if self.validation else {}
        return (
            [[last.get(key) if panel.training else None for key in panel.keys] for panel in self.panels],
            [[validation.get(key) for key in panel.keys] for panel in self.panels],
        )


def read_run(exp: Path) -> RunMetrics:
    """Read the metrics of a run folder. Raises UserError if it is not one, or has no metrics yet."""
    path = exp / "metrics.jsonl"
    train, validation = (
        [record for record in read_metrics(path, split) if record.get("hours_seen") is not None]
        for split in ("train", "validation")
    )
    if not train:
        raise UserError(f"{exp}: no metrics yet; the run has logged no update")
    if not (exp / "config.yaml").is_file():
        raise UserError(f"{exp}: not a run folder: it contains no config.yaml")
    panels = build_objective(load_config(exp / "config.yaml")).panels()
    roll_backs = [line["update"] for line in read_metrics(path, "roll_back")]
    return RunMetrics(exp, train, validation, panels, roll_backs)


def draw_curves(exps: Sequence[Path], output: Path) -> Path:
    """Draw the curves of one or several runs into one image file: the panels of the objective and the gradient norm.

    Dashed lines are where a run went back to a checkpoint.
    Raises UserError if a folder is not a run folder, a run has no metrics yet, or the file cannot be written.
    """
    runs = [read_run(exp) for exp in exps]
    figure = new_figure(width=11, height=7)
    grid = figure.subplots(2, 2, sharex=True)
    *panel_axes, norm = grid.flat
    for index, run in enumerate(runs):
        for axes, panel in zip(panel_axes, run.panels, strict=True):
            _draw_panel(axes, panel, run, f"C{index}")
        _plot(norm, run.train, "grad_norm", color=f"C{index}")
        for axes in grid.flat:
            for update in run.roll_backs:
                axes.axvline(update, color=f"C{index}", linewidth=0.8, linestyle="--")
    for axes, panel in zip(panel_axes, runs[-1].panels, strict=True):
        axes.set_ylabel(panel.label)
        if panel.chance is not None:
            axes.axhline(panel.chance, color="grey", linewidth=0.8, linestyle=":", label="chance")
    panel_axes[2].set_ylim(bottom=0)
    norm.set(ylabel="gradient norm, before clipping", yscale="log")
    for axes in grid[1]:
        axes.set_xlabel("update")
    for axes in (panel_axes[0], panel_axes[2]):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False)
    for axes in figure.axes:
        add_grid(axes)
    if len(runs) == 1:
        last = runs[0].train[-1]
        figure.suptitle(f"{plain(exps[0].name)}: {last['hours_seen']:.2f} hours seen in {last['update']} updates")
    save_figure(figure, output)
    return output


def _draw_panel(axes: Axes, panel: Panel, run: RunMetrics, color: str) -> None:
    """Training and validation of a single metric, or training of several metrics."""
    name = plain(run.exp.name)
    for number, (key, label) in enumerate(panel.keys.items()):
        if label:
            style = ("-", "--", ":", "-.")[number % 4]
            _plot(axes, run.train, key, color=color, linestyle=style, label=f"{name}, {label}")
            continue
        if panel.training:
            _plot(axes, run.train, key, color=color, alpha=0.5, label=f"{name}, training")
        _plot(axes, run.validation, key, color=color, marker="o", label=f"{name}, validation")


def _plot(axes: Axes, records: Sequence[Record], key: str, **style: Any) -> None:
    points = [(record["update"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.3, "markersize": 3.5, **style})
