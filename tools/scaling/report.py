"""Tables and the plot of scale_model.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.bench.script import console
from tools.scaling.growth import added, dealt, efficiency
from tools.scaling.published import Comparison
from w2vscale.analysis.figures import add_grid, new_figure, save_figure
from w2vscale.planning.prediction import Prediction, Setting
from w2vscale.planning.traffic import ENGINES
from w2vscale.planning.work import Model

PLOTTED = ("ddp", "fsdp", "hsdp")
"""Engines in the plot of efficiencies."""


def limit(prediction: Prediction) -> str:
    """What takes more than a tenth of the update: waiting for links or hosts, or an optimizer step."""
    if prediction.exposed > 0.1:
        return " hosts" if prediction.host >= prediction.seconds else " links"
    return " step" if prediction.stepping > 0.1 * prediction.seconds else ""


def print_dealt(model: Model, rows: Mapping[str, Sequence[Prediction]], setting: Setting) -> None:
    """Days of training with the preset's batch, by engine and number of GPUs."""
    batch, updates = model.config.batch, model.config.trainer.updates
    table = _table(
        f"{model.name}, {model.parameters / 1e6:,.0f} M parameters: days for {updates:,} updates of "
        f"{batch.micro_batches} micro-batches, and efficiency"
    )
    for prediction in next(iter(rows.values())):
        table.add_column(f"{prediction.ranks} GPU{'s' * (prediction.ranks > 1)}", justify="right")
    for engine, predictions in rows.items():
        cells = [
            f"{one.days:.2f} ({efficiency(one, setting):.0%}{limit(one)})" if one.fits else "does not fit"
            for one in predictions
        ]
        table.add_row(engine, *cells)
    console.print(table)


def print_added(model: Model, rows: Mapping[str, Sequence[Prediction]], needed: Mapping[str, int | None],
                setting: Setting) -> None:  # fmt: skip
    """Efficiency with the same work on each GPU, and how much work a GPU needs for 90 % on the most GPUs."""
    first = next(iter(rows.values()))
    table = _table(
        f"{model.name}, {first[0].micro_batches} micro-batches "
        f"({first[0].micro_batches * model.micro_batch_seconds:.0f} s of audio) per GPU and update: efficiency"
    )
    for prediction in first:
        table.add_column(f"{prediction.ranks} GPU{'s' * (prediction.ranks > 1)}", justify="right")
    table.add_column(f"for 90 % on {first[-1].ranks}: micro-batches per GPU", justify="right")
    for engine, predictions in rows.items():
        cells = [f"{efficiency(one, setting):.0%}{limit(one)}" if one.fits else "does not fit" for one in predictions]
        table.add_row(engine, *cells, str(needed[engine] or "more than 512"))
    console.print(table)


def print_published(rows: Sequence[Comparison]) -> None:
    """Published figures and predicted ones."""
    table = Table(title="Published", box=None, header_style="bold", title_justify="left")
    table.add_column("")
    table.add_column("published", justify="right")
    table.add_column("predicted", justify="right")
    for row in rows:
        table.add_row(row.what, f"{row.published:,.4g}", f"{row.predicted:,.4g}")
    console.print(table)


def print_validation(rows: Sequence[Mapping[str, Any]], machine: str) -> None:
    """Measured and predicted seconds, and bytes, on hosts with slow links."""
    table = _table(f"tiny on hosts with slow links, gloo, one thread each: seconds per update ({machine})")
    for heading in ("hosts", "Mb/s", "alone", "measured", "predicted", "error", "MB sent", "predicted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["engine"],
            str(row["hosts"]),
            f"{row['megabits']:g}" if row["megabits"] else "–",
            f"{row['window'] + row['step']:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['predicted']:.3f}",
            f"{row['predicted'] / row['seconds'] - 1:+.1%}",
            f"{row['sent'] / 1e6:.2f}",
            f"{row['predicted_sent'] / 1e6:.2f}",
        )
    console.print(table)


def _table(title: str) -> Table:
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("engine")
    return table


def figures_of(prediction: Prediction, setting: Setting) -> dict[str, Any]:
    """A prediction for the JSON."""
    return {
        "gpus": prediction.ranks,
        "micro_batches_per_gpu": prediction.micro_batches,
        "seconds": prediction.seconds,
        "computing_seconds": prediction.computing,
        "host_seconds": prediction.host,
        "efficiency": efficiency(prediction, setting),
        "audio_per_second": prediction.audio_per_second,
        "days": prediction.days,
        "gpu_hours": prediction.gpu_hours,
        "fits": prediction.fits,
    }


def draw(
    output: Path, models: Sequence[Model], gpus: Sequence[int], settings: Mapping[str, Mapping[str, Setting]]
) -> None:
    """Days of training for all presets, and efficiency of the largest one. `settings`: by cluster, then by preset."""
    figure = new_figure(width=12, height=4.8)
    left, right = figure.subplots(1, 2)
    first = next(iter(settings))
    for number, model in enumerate(models):
        best = [
            min((one for one in at_once if one.fits), key=lambda one: one.seconds, default=None)
            for at_once in zip(
                *(dealt(model, engine, gpus, settings[first][model.name]) for engine in ENGINES), strict=True
            )
        ]
        shown = [one for one in best if one is not None]
        left.plot(
            [one.ranks for one in shown], [one.days for one in shown], marker="o", markersize=4, color=f"C{number}",
            label=f"{model.name} ({model.parameters / 1e6:,.0f} M)",
        )  # fmt: skip
        ideal = [shown[0].days * shown[0].ranks / one.ranks for one in shown]
        left.plot([one.ranks for one in shown], ideal, color=f"C{number}", linewidth=0.8, linestyle=":")
    left.set_title(f"The preset's batch, dealt to more GPUs ({first}, best engine)", fontsize="medium")
    left.set_ylabel("days of training (dotted: ideal)")
    left.set_yscale("log")
    left.legend(fontsize="small")
    largest = max(models, key=lambda model: model.parameters)
    for cluster, style in zip(settings, ("-", "--", ":"), strict=False):
        setting = settings[cluster][largest.name]
        for number, engine in enumerate(PLOTTED):
            rows = added(largest, engine, gpus, largest.config.batch.same_bucket, setting)
            right.plot(
                [one.ranks for one in rows], [100 * efficiency(one, setting) for one in rows], style,
                marker="o", markersize=3, color=f"C{number}", label=f"{engine}, {cluster}",
            )  # fmt: skip
    seconds = largest.config.batch.same_bucket * largest.micro_batch_seconds
    right.set_title(f"{largest.name}, {seconds:.0f} s of audio on each GPU", fontsize="medium")
    right.set_ylabel("efficiency, % of one GPU in long forwards")
    right.set_ylim(0, 105)
    right.legend(fontsize="x-small", loc="lower left", handlelength=3.5)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(gpus), [str(ranks) for ranks in gpus], fontsize="small")
        axes.set_xlabel("GPUs")
        add_grid(axes)
    save_figure(figure, output)
