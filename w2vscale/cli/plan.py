"""`w2vscale plan`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.arguments import Overrides, Source, finite
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import UserError, counted

if TYPE_CHECKING:
    from w2vscale.planning.plan import Plan, Row

GB = 1e9


def plan(
    source: Source,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="Number of GPUs, on all nodes together.")],
    gpu_memory: Annotated[
        float, typer.Option(metavar="GB", min=1.0, callback=finite, help="Memory of a GPU in GB (10^9 bytes).")
    ],
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(metavar="M", min=1, help="Number of nodes.", show_default="one per 8 GPUs")
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="h100|h100_one_nic|a100|cloud", help="Speeds of the GPUs and of their links.")
    ] = "h100",
    inside: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S", min=0.001, callback=finite, help="Nominal GB/s that a GPU can send inside its node.",
            show_default="that of --cluster",
        ),
    ] = None,
    across: Annotated[
        float | None,
        typer.Option(
            metavar="GBIT/S", min=0.001, callback=finite, help="Nominal Gb/s that a node can send to others.",
            show_default="that of --cluster",
        ),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", min=0.0, callback=finite, help="Host memory of a node in GB that offloading may use.",
            show_default="no limit",
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take computing times from this gpu.json of tools/bench/gpu.py."),
    ] = None,
) -> None:  # fmt: skip
    """Predict the memory and time of a run for each engine, recomputation and offload, and recommend one.

    Needs no GPU. With data.train=CUTS, also prints the number of epochs.

    Example: w2vscale plan xlsr_2b --gpus 8 --gpu-memory 80
    """
    from w2vscale.objectives.settings import load_settings

    load_settings(source, overrides or [])  # refuses wrong ones at once; the next imports take seconds
    from w2vscale.planning.links import CLUSTERS, changed
    from w2vscale.training.planning import plan_run

    if cluster not in CLUSTERS:
        raise UserError(f"--cluster {cluster}: choose one of {', '.join(CLUSTERS)}")
    speeds = replace(
        changed(CLUSTERS[cluster], gpus_per_node=None, inside=inside, across=across),
        memory=gpu_memory * GB,
        host_memory=math.inf if host_memory is None else host_memory * GB,
    )
    with progress_bar("combinations") as progress:
        found, warning = plan_run(
            source, overrides or [], gpus=gpus, nodes=nodes, cluster=speeds, rates=rates, progress=progress
        )
    _print_run(found)
    _print_rows(found)
    _print_recommendation(found)
    _print_assumptions(found, rates)
    if warning is not None:
        console.print(f"warning: {warning}")


def _print_run(plan: Plan) -> None:
    batch, seen = plan.model.config.batch, plan.exposure
    epochs = "" if seen.epochs is None else f", {seen.epochs:,.1f} epochs of data.train"
    console.print(
        f"{plan.model.name}: {plan.model.parameters:,} parameters, {plan.model.config.precision.compute}\n"
        f"An update: {plan.micro_batches} micro-batches of up to {batch.max_seconds:g} s, "
        f"{seen.hours_per_update:.2f} hours of audio. {seen.updates:,} updates: {seen.hours:,.0f} hours{epochs}"
    )
    if plan.micro_batches != batch.micro_batches:
        change = plan.micro_batches / batch.micro_batches - 1
        console.print(
            f"batch.micro_batches={batch.micro_batches} is not a multiple of {plan.gpus} GPUs: planned with "
            f"{plan.micro_batches}, which changes the audio of an update by {change:+.1%}"
        )


def _print_rows(plan: Plan) -> None:
    columns = (
        "\nengine", "\nrecompute", "weights\nGB", "grads\nGB", "moments\nGB", "activ.\nGB", "buffers\nGB", "total\nGB",
        "host\nGB", "longest\ns", "\nconcat", "sent\nGB", "links\ns", "update\ns", "\ndays",
    )  # fmt: skip
    title = (
        f"Memory of a GPU: {plan.cluster.memory / GB:g} GB, of which {plan.limit / GB:.1f} can be used. "
        f"{counted(plan.gpus, 'GPU')}, {counted(plan.nodes, 'node')}"
    )
    print_table(columns, [_cells(plan, row) for row in plan.rows], title=title)
    if any(row.fits and _is_shortened(plan, row) for row in plan.rows):
        console.print(
            f"* below batch.max_seconds={plan.model.config.batch.max_seconds:g}: timed with shorter micro-batches"
        )
    for row in plan.rows:
        if not row.fits:
            console.print(f"does not fit: {row.engine}, recompute={row.recomputation}: {_missing(row)}")


def _is_shortened(plan: Plan, row: Row) -> bool:
    """Whether micro-batches of the settings do not fit, but shorter ones do."""
    return row.footprint.total > plan.limit


def _cells(plan: Plan, row: Row) -> list[str]:
    parts, prediction = row.footprint, row.prediction
    memory = [
        f"{parts.parameters / GB:.1f}",
        f"{parts.gradients / GB:.1f}",
        f"{parts.moments / GB:.1f}",
        f"{parts.activations / GB:.1f}" if parts.activations else "–",  # the peak is outside of forward and backward
        f"{parts.buffers / GB:.1f}",
        f"{parts.total / GB:.1f}",
        f"{parts.host * plan.cluster.gpus_per_node / GB:.0f}" if parts.host else "",
    ]
    if prediction is None:
        return [row.engine, row.recomputation, *memory]
    return [
        row.engine,
        row.recomputation,
        *memory,
        f"{row.longest:,.0f}{'*' if _is_shortened(plan, row) else ''}",
        str(prediction.per_forward),
        f"{prediction.sent / GB:.1f}",
        f"{prediction.sending:.2f}",
        f"{prediction.seconds:.2f}",
        _digits(prediction.days),
    ]


def _missing(row: Row) -> str:
    if row.lacks:
        return f"needs {row.lacks / GB:.1f} GB more per GPU"
    return f"needs {row.lacks_host / GB:.1f} GB more host memory per node"


def _digits(number: float) -> str:
    if number < 0.01:
        return "<0.01"
    if number < 1.0:
        return f"{number:.2f}"
    return f"{number:,.0f}" if number >= 100.0 else f"{number:.3g}"


def _print_recommendation(plan: Plan) -> None:
    row = plan.recommended
    if row is None:
        closest = plan.rows[0]
        advice = "more GPUs do not help; lower data.max_seconds"
        if plan.enough is not None:
            advice = f"{counted(plan.enough, 'GPU')} are enough (fsdp or zero3, recompute=full)"
        console.print(
            f"Nothing fits. {closest.engine} with recompute={closest.recomputation} {_missing(closest)}; {advice}"
        )
        return
    assert row.prediction is not None
    found, host = row.prediction, ""
    if row.footprint.host:
        host = f" It needs {row.footprint.host * plan.cluster.gpus_per_node / GB:.0f} GB of host memory per node."
    console.print(
        f"Recommended: {row.engine}, recompute={row.recomputation}: {_digits(found.days)} days, "
        f"{_digits(found.gpu_hours)} GPU-hours, {found.audio_per_second:,.0f} s of audio per second.\n"
        f"GPUs wait for links or the host {found.exposed:.0%} of the time.{host} Settings to type:"
    )
    console.print(f"  {' '.join(plan.overrides(row)) or 'none: these are the settings of the run'}")
    batch = found.model.config.batch
    if batch.max_seconds != plan.model.config.batch.max_seconds:
        console.print(
            f"An update then has as much audio in {batch.micro_batches} micro-batches of up to {batch.max_seconds:g} s"
        )


def _print_assumptions(plan: Plan, rates: Path | None) -> None:
    from w2vscale.planning.fitting import CONTEXT, SHARE
    from w2vscale.planning.rates import ATTAINED, ATTAINED_EAGER

    cluster = plan.cluster
    computing = f"as measured in {rates}"
    if rates is None:
        speeds = f"{cluster.flops / 1e12:,.0f} TFLOP/s, {cluster.bandwidth / 1e12:.1f} TB/s of GPU memory"
        computing = f"{ATTAINED:.0%} of the roofline ({speeds}); {ATTAINED_EAGER:.0%} without compilation"
    console.print(
        "Assumed (docs/planning.md):\n"
        f"  memory      {CONTEXT / GB:g} GB for CUDA and NCCL, {SHARE:.0%} of the rest used\n"
        f"  computing   {computing}\n"
        f"  GPUs        {cluster.description}\n"
        f"  links       {cluster.inside.bandwidth / GB:.0f} GB/s per GPU inside a node, "
        f"{cluster.across.bandwidth / GB:.3g} GB/s per node across\n"
        f"  offloading  {cluster.pcie / GB:.0f} GB/s per GPU, {cluster.host_bandwidth / GB:.0f} GB/s of host memory "
        "per node, no overlap with computing"
    )
