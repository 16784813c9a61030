"""Plot and summarise the metrics of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from w2vscale.analysis.figures import new_figure, save_figure
from w2vscale.errors import UserError
from w2vscale.files import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]


def read_metrics(path: Path, split: str) -> list[Record]:
    """Read the records of one split (`train` or `validation`) of a metrics.jsonl.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        records = read_records(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return [record for record in records if record.get("split") == split]


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, and the model settings that its plots need."""

    exp: Path
    train: list[Record]
    validation: list[Record]
    model: Record

    @property
    def fine_tuning(self) -> bool:
        """Whether the run is a fine-tuning run."""
        return is_fine_tuning(self.train[-1])


@dataclass(frozen=True)
class RunSummary:
    """The progress of a run, and its latest metrics."""

    update: int
    hours_seen: float
    training: Record
    validation: Record | None
    code_perplexities: list[float | None]


def read_curves(exp: Path) -> Curves:
    """Read the metrics of a run folder.

    Raises:
        UserError: it is not a run folder, or has no metrics yet.
    """
    path = exp / "metrics.jsonl"
    train, validation = read_metrics(path, "train"), read_metrics(path, "validation")
    if not train:
        raise UserError(f"{exp}: no metrics yet; the run has logged no update")
    try:
        model: Record = yaml.safe_load((exp / "config.yaml").read_text())["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{exp}: not a run folder: it contains no readable config.yaml") from None
    return Curves(exp, train, validation, model)


def summarise(exp: Path) -> RunSummary:
    """Return the latest training and validation metrics of a run.

    Raises:
        UserError: it is not a run folder, or has no metrics yet.
    """
    run = read_curves(exp)
    training = run.train[-1]
    last = run.validation[-1] if run.validation else training
    keys = [f"code_perplexity_{codebook}" for codebook in range(run.model["codebooks"])]
    return RunSummary(
        update=int(training["update"]),
        hours_seen=training["hours_seen"],
        training=training,
        validation=run.validation[-1] if run.validation else None,
        code_perplexities=[last[key] for key in keys if key in last],
    )


def is_fine_tuning(record: Record) -> bool:
    """Whether a record belongs to a fine-tuning run."""
    return "label_error_rate" in record


def draw_curves(exps: Sequence[Path], output: Path) -> Path:
    """Draw the curves of one or several runs into one PNG file.

    For pretraining: loss, accuracy, code perplexity and gradient norm. For fine-tuning: loss per label, label error
    rate in validation, learning rate and gradient norm.

    Raises:
        UserError: a folder is not a run folder, a run has no metrics yet, or the file cannot be written.
    """
    runs = [read_curves(exp) for exp in exps]
    figure = new_figure(width=11, height=7)
    (loss, accuracy), (codes, norm) = figure.subplots(2, 2, sharex=True)
    for index, run in enumerate(runs):
        draw = _draw_fine_tuning if run.fine_tuning else _draw_pretraining
        draw(run, f"C{index}", loss, accuracy, codes)
        _plot(norm, run.train, "grad_norm", color=f"C{index}")
    _label(runs[-1], loss, accuracy, codes)
    codes.set_ylim(bottom=0)
    norm.set_ylabel("gradient norm, before clipping")
    norm.set_yscale("log")
    for axes in (codes, norm):
        axes.set_xlabel("update")
    for axes in (loss, codes):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) == 1:
        last = runs[0].train[-1]
        figure.suptitle(f"{exps[0].name}: {last['hours_seen']:.2f} hours seen in {last['update']} updates")
    save_figure(figure, output)
    return output


def _draw_pretraining(run: Curves, color: str, loss: Axes, accuracy: Axes, codes: Axes) -> None:
    name = run.exp.name
    _plot(loss, run.train, "contrastive_bits", color=color, alpha=0.5, label=f"{name}, training")
    _plot(loss, run.validation, "contrastive_bits", color=color, marker="o", label=f"{name}, validation")
    _plot(accuracy, run.train, "accuracy", color=color, alpha=0.5)
    _plot(accuracy, run.validation, "accuracy", color=color, marker="o")
    for codebook in range(run.model["codebooks"]):
        style = ("-", "--", ":", "-.")[codebook % 4]
        label = f"{name}, codebook {codebook}"
        _plot(codes, run.train, f"code_perplexity_{codebook}", color=color, linestyle=style, label=label)


def _draw_fine_tuning(run: Curves, color: str, loss: Axes, errors: Axes, learning_rate: Axes) -> None:
    name = run.exp.name
    _plot(loss, run.train, "loss", color=color, alpha=0.5, label=f"{name}, training")
    _plot(loss, run.validation, "loss", color=color, marker="o", label=f"{name}, validation")
    _plot(errors, run.validation, "label_error_rate", color=color, marker="o")
    _plot(learning_rate, run.train, "lr", color=color)


def _label(run: Curves, loss: Axes, accuracy: Axes, codes: Axes) -> None:
    if run.fine_tuning:
        loss.set_ylabel("loss per label (nats)")
        accuracy.set_ylabel("label error rate, validation")
        codes.set_ylabel("learning rate")
        return
    chance = 1.0 / (1 + run.model["negatives"])
    loss.axhline(-math.log2(chance), color="grey", linewidth=0.8, linestyle=":", label="chance")
    accuracy.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    loss.set_ylabel("contrastive loss (bits)")
    accuracy.set_ylabel("contrastive accuracy")
    codes.set_ylabel(f"code perplexity (of {run.model['codebook_entries']})")


def _plot(axes: Axes, records: Sequence[Record], key: str, **style: Any) -> None:
    points = [(record["update"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.3, "markersize": 3.5, **style})
