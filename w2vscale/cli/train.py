"""`w2vscale train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from w2vscale.cli.arguments import Exp, Overrides, Processes, Resume, Source, launch_if_asked

if TYPE_CHECKING:
    from w2vscale.training.dry_run import DryRun


def train(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    exp: Exp = None,
    resume: Resume = "auto",
    nproc_per_node: Processes = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run only the largest micro-batch and print its shapes, loss and memory."),
    ] = False,
) -> None:
    """Train a model. The same command starts a run and resumes it.

    Example: w2vscale train base data.train=cuts_train.jsonl batch.micro_batches=32 --exp exp/base
    """
    from w2vscale import runtime
    from w2vscale.config import load_config

    config = load_config(source, overrides or [])
    launch_if_asked(context, nproc_per_node)
    if dry_run:
        from w2vscale.training.dry_run import dry_run as run_dry

        if found := run_dry(config):
            _print_dry_run(found)
        return
    from w2vscale.training.loop import train as run_training

    with runtime.training(compiled=config.engine.compile) as stop:
        code = run_training(
            config,
            exp or Path("exp") / Path(source).stem,
            resume=resume,
            command=context.obj,
            stop=stop,
            around_updates=runtime.collected_between_steps,
        )
    sys.exit(code)


def _print_dry_run(found: DryRun) -> None:
    from rich.table import Table

    from w2vscale.cli.progress import console

    table = Table(title="dry run: the largest micro-batch, forward and backward", box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in found.parameters.items():
        table.add_row(f"parameters in {name}", f"{count:,}")
    table.add_row("parameters", f"{sum(found.parameters.values()):,}")
    for name, shape in found.shapes.items():
        table.add_row(escape(name), " x ".join(f"{size:,}" for size in shape))
    table.add_row("weight in the loss (masked frames, or labels)", f"{found.weight:,}")
    table.add_row("loss per unit of weight", f"{found.loss:.3f} nats")
    table.add_row("gradient norm", f"{found.grad_norm:.3f}")
    table.add_row("time for two forward and backward passes and a step", f"{found.seconds:.2f} s")
    table.add_row("peak memory", f"{found.peak_memory_bytes / 2**30:.2f} GiB")
    if found.micro_batches_per_epoch is not None:
        table.add_row("micro-batches per epoch", f"{found.micro_batches_per_epoch:,}")
    console.print(table)
