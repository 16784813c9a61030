"""Predict the time of training on 1 to 1,024 GPUs, for each preset and engine. What is assumed: docs/scaling.md.

    python tools/scale_model.py                                     all sizes on nodes of 8 H100 with InfiniBand
    python tools/scale_model.py --preset base --cluster cloud
    python tools/scale_model.py --preset large --inside 300 --across 100 --mfu 0.3
    python tools/scale_model.py --validate                          measure again what the model is compared with

Prints days of training with the preset's batch on more and more GPUs; efficiency where the batch grows with the GPUs;
and measured beside predicted times of updates on hosts with slow links, from a record or, with --validate, measured now
(as root, 6 to 10 minutes). The last line is JSON; `max_relative_error` is the largest error on 2 and 3 hosts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.bench.script import console, run_script
from tools.scaling import report
from tools.scaling.growth import MEASURED, added, dealt, enough, preset_model
from tools.scaling.published import comparisons
from tools.scaling.validation import RECORD, Trial, compared, measure, read_record, write_record
from w2vscale.hardware import cpu_name
from w2vscale.planning.links import ALGORITHMS, CLUSTERS, H100, Cluster, changed
from w2vscale.planning.prediction import Setting
from w2vscale.planning.rates import Rates, measured_rates
from w2vscale.planning.traffic import ENGINES
from w2vscale.planning.work import Model

PRESETS = ("base", "large", "xlsr_300m", "xlsr_1b", "xlsr_2b")
GPUS = tuple(2**power for power in range(11))
SHOWN = (1, 8, 64, 256, 1024)
"""Numbers of GPUs in the table of efficiencies."""


def main(
    preset: Annotated[
        list[str] | None, typer.Option(help="Pretraining preset; repeatable.", show_default=", ".join(PRESETS))
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(ENGINES), help="Engine; repeatable.", show_default="all"),
    ] = None,
    cluster: Annotated[str, typer.Option(metavar="|".join(CLUSTERS), help="Nodes and links.")] = "h100",
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node.")] = None,
    inside: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s that a GPU can send inside its node."),
    ] = None,
    across: Annotated[float | None, typer.Option(min=0.001, help="Gb/s that a node can send to others.")] = None,
    algorithm: Annotated[str, typer.Option(metavar="|".join(ALGORITHMS), help="Algorithm of collectives.")] = "fastest",
    rates: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Result of tools/bench/gpu.py for these GPUs.", show_default="that of an H100, scaled"
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.001, max=1.0, help="MFU in long forwards, instead of a measured one."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Output image.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Measure updates on hosts with slow links (needs root).")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Measured updates to compare with; --validate writes it.", show_default="docs/lab"
        ),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Measured updates per point, with --validate.")] = Trial.updates,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
) -> None:
    """Predict training times."""
    engines = _chosen(engine, tuple(ENGINES), "--engine")
    if ignored := [one for one in settings or [] if one.startswith("engine.")]:
        raise typer.BadParameter(f"{ignored[0]}: choose the engine with --engine", param_hint="SETTINGS")
    if gpus_per_node is not None and gpus_per_node & (gpus_per_node - 1):
        raise typer.BadParameter(
            f"{gpus_per_node}: the numbers of GPUs are powers of two", param_hint="--gpus-per-node"
        )
    _chosen([cluster], tuple(CLUSTERS), "--cluster")
    _chosen([algorithm], ALGORITHMS, "--algorithm")
    by_preset = None if rates is None else measured_rates(rates)
    models = [preset_model(name, settings or []) for name in preset or PRESETS]
    here = changed(CLUSTERS[cluster], gpus_per_node=gpus_per_node, inside=inside, across=across)
    chosen = {
        name: {model.name: _setting(model, one, algorithm, by_preset, mfu) for model in models}
        for name, one in (CLUSTERS | {cluster: here}).items()
    }
    console.print(f"{here.description}; collectives: {algorithm}")
    predictions = {model.name: predict_all(model, engines, chosen[cluster][model.name]) for model in models}
    if plot is not None:
        drawn = dict.fromkeys((cluster, "h100_one_nic", "cloud"))
        report.draw(plot, models, GPUS, {name: chosen[name] for name in drawn})
    for model in models:
        if model.name == "base":
            report.print_published(comparisons(model, chosen[cluster]["base"]))
    validation = validated(updates if validate else None, record)
    print(json.dumps(validation | {"cluster": here.description, "algorithm": algorithm, "predictions": predictions}))


def validated(updates: int | None, record: Path | None) -> dict[str, Any]:
    """Compare the model with measured updates, and print the table.

    With `updates`, this number is measured per point now and written to `record`. Otherwise they are read from there.
    """
    if updates is not None:
        trial = Trial(updates=updates)
        points, machine = measure(trial), f"{cpu_name()}, {time.strftime('%Y-%m-%d')}"
        if record is not None:
            write_record(record, points, trial, machine)
    else:
        if not (record or RECORD).is_file():
            raise typer.BadParameter(f"{record or RECORD}: no such file", param_hint="--record")
        points, trial, machine = read_record(record or RECORD)
    rows = list(compared(points, trial))
    report.print_validation(rows, machine)
    errors = [row["error"] for row in rows if row["hosts"] > 1]
    return {"max_relative_error": max(errors), "points": len(errors), "measured_on": machine, "validation": rows}


def _chosen(names: list[str] | None, known: Sequence[str], option: str) -> Sequence[str]:
    if unknown := [name for name in names or [] if name not in known]:
        raise typer.BadParameter(f"{unknown[0]}: not one of {', '.join(known)}", param_hint=option)
    return names or known


def _setting(
    model: Model, cluster: Cluster, algorithm: str, by_preset: dict[str, Rates] | None, mfu: float | None
) -> Setting:
    """Computing times are those of the measured preset that is nearest in size.

    Without a measurement of these GPUs, they have the MFU of an H100.
    """
    (chosen,) = [name for name in ALGORITHMS if name == algorithm]
    rates = (by_preset or measured_rates(MEASURED))["base" if model.config.model.dim < 1024 else "large"]
    if by_preset is None:
        rates = rates._replace(flops=rates.flops * cluster.flops / H100.flops)
    return Setting(cluster, chosen, rates if mfu is None else rates._replace(flops=mfu * cluster.flops))


def predict_all(model: Model, engines: Sequence[str], setting: Setting) -> dict[str, Any]:
    """Print the tables of a preset; its predictions for the JSON."""
    most = model.config.batch.same_bucket
    by_engine = {engine: dealt(model, engine, GPUS, setting) for engine in engines}
    growing = {engine: added(model, engine, GPUS, most, setting) for engine in engines}
    needed = {engine: enough(model, engine, GPUS[-1], setting) for engine in engines}
    report.print_dealt(model, by_engine, setting)
    shown = {engine: [one for one in rows if one.ranks in SHOWN] for engine, rows in growing.items()}
    report.print_added(model, shown, needed, setting)
    return {
        engine: {
            "batch_of_the_preset": [report.figures_of(one, setting) for one in by_engine[engine]],
            "batch_that_grows": [report.figures_of(one, setting) for one in growing[engine]],
            "micro_batches_for_90_percent": needed[engine],
        }
        for engine in engines
    }


if __name__ == "__main__":
    run_script(main)
