"""A run's curves as a picture, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from w2vscale.analysis.figures import import_pyplot, save_figure
from w2vscale.errors import UserError

Record = dict[str, Any]


def read_metrics(path: Path, split: str) -> list[Record]:
    """The records of one split (train, validation) of a metrics.jsonl.

    Raises:
        UserError: there is no such file, or a line is not JSON.
    """
    try:
        # What follows the last line's end is a line that is being written, or that a kill cut short.
        whole = path.read_text().rpartition("\n")[0]
        records = [json.loads(line) for line in whole.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a metrics file ({error})") from None
    return [record for record in records if record.get("split") == split]


@dataclass(frozen=True)
class RunSummary:
    """Where a run stands: its last records."""

    update: int
    hours_seen: float
    training: Record
    validation: Record | None
    code_perplexities: list[float | None]


def summarise(exp: Path) -> RunSummary:
    """The last training and validation figures of a run.

    Raises:
        UserError: the folder holds no run, or no metrics yet.
    """
    training = read_metrics(exp / "metrics.jsonl", "train")
    if not training:
        raise UserError(f"{exp}: no metrics in it yet")
    validation = read_metrics(exp / "metrics.jsonl", "validation")
    last = validation[-1] if validation else training[-1]
    return RunSummary(
        update=int(training[-1]["update"]),
        hours_seen=training[-1]["hours_seen"],
        training=training[-1],
        validation=validation[-1] if validation else None,
        code_perplexities=[
            last[key]
            for codebook in range(_model_of(exp)["codebooks"])
            if (key := f"code_perplexity_{codebook}") in last
        ],
    )


def is_fine_tuning(record: Record) -> bool:
    """Whether a record is of a run that learns transcripts."""
    return "label_error_rate" in record


def draw_curves(exps: Sequence[Path], output: Path) -> Path:
    """Draw loss, accuracy, codebook use and gradient norm of one or several runs into one PNG.

    Of fine-tuning runs: loss of a label, label errors in validation, and the learning rate in place of codebooks.

    Raises:
        UserError: a run has no metrics yet, or the picture cannot be written.
    """
    pyplot = import_pyplot()
    figure, ((loss, accuracy), (codes, norm)) = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for index, exp in enumerate(exps):
        train = read_metrics(exp / "metrics.jsonl", "train")
        validation = read_metrics(exp / "metrics.jsonl", "validation")
        if not train:
            raise UserError(f"{exp}: no metrics in it yet")
        model = _model_of(exp)
        color = f"C{index}"
        name = exp.name
        fine_tuning = is_fine_tuning(train[-1])
        losses, shares = ("loss", "label_error_rate") if fine_tuning else ("contrastive_bits", "accuracy")
        _draw(loss, train, losses, color=color, alpha=0.5, label=f"{name}, training")
        _draw(loss, validation, losses, color=color, marker="o", label=f"{name}, validation")
        if not fine_tuning:
            _draw(accuracy, train, shares, color=color, alpha=0.5)
        _draw(accuracy, validation, shares, color=color, marker="o")
        for codebook in range(model["codebooks"]):
            style = ("-", "--", ":", "-.")[codebook % 4]
            label = f"{name}, codebook {codebook}"
            _draw(codes, train, f"code_perplexity_{codebook}", color=color, linestyle=style, label=label)
        if fine_tuning:
            _draw(codes, train, "lr", color=color)
        _draw(norm, train, "grad_norm", color=color)
        chance = 1.0 / (1 + model["negatives"])
    if not fine_tuning:
        loss.axhline(-math.log2(chance), color="grey", linewidth=0.8, linestyle=":", label="chance")
        accuracy.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    loss.set_ylabel("loss of a label (nats)" if fine_tuning else "contrastive loss (bits)")
    accuracy.set_ylabel("label error rate, validation" if fine_tuning else "contrastive accuracy")
    codes.set_ylabel("learning rate" if fine_tuning else f"code perplexity (of {model['codebook_entries']})")
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
    if len(exps) == 1:
        figure.suptitle(f"{exps[0].name}: {train[-1]['hours_seen']:.2f} hours seen in {train[-1]['update']} updates")
    save_figure(figure, output)
    return output


def _draw(axes: Any, records: Sequence[Record], key: str, **style: Any) -> None:
    points = [(record["update"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.3, "markersize": 3.5, **style})


def _model_of(exp: Path) -> Record:
    try:
        model: Record = yaml.safe_load((exp / "config.yaml").read_text())["model"]
        return model
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{exp}: not a run's folder: no readable config.yaml in it") from None
