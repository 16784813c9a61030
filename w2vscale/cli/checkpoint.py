"""`w2vscale checkpoint`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Checkpoint

app = typer.Typer(no_args_is_help=True, help="Look at, check and convert checkpoints.")


@app.command()
def show(
    path: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
) -> None:
    """What a checkpoint is and holds."""
    from rich.filesize import decimal
    from rich.table import Table

    from w2vscale.checkpoint.inspection import describe
    from w2vscale.cli.progress import console

    found = describe(path, log=partial(console.print, markup=False))
    checkpoint, state, model = found.checkpoint, found.checkpoint.state, found.config.model
    engine = found.config.engine
    kinds = [name.partition(".")[0] for name in found.tensors]
    table = Table(title=str(checkpoint.path), title_justify="left", box=None, show_header=False)
    for name, value in (
        ("update", f"{state.update:,} of {found.config.trainer.updates:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.2f}"),
        ("skipped updates", f"{state.skipped_updates:,}"),
        ("skipped utterances", f"{state.skipped_utterances:,}"),
        ("parameters", f"{found.parameters:,}"),
        ("shape", f"{model.layers}x{model.dim}x{model.ffn_dim}x{model.heads} (layers x dim x ffn_dim x heads)"),
        (
            "written by",
            f"{engine.name}{f' {engine.deepspeed_config}' * (engine.name == 'deepspeed')}, "
            f"{checkpoint.ranks} process{'es' * (checkpoint.ranks > 1)}",
        ),
        ("tensors", f"{kinds.count('model'):,} of the model, {kinds.count('optim'):,} of the optimizer"),
        ("files", f"{len(checkpoint.files):,}, {decimal(checkpoint.bytes)}"),
    ):
        table.add_row(name, value)
    console.print(table, markup=False)
    if tensors:
        table = Table(box=None, header_style="bold")
        table.add_column("tensor", no_wrap=True)
        for column in ("shape", "bytes", "shards"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, tensor in sorted(found.tensors.items()):
            table.add_row(name, "x".join(map(str, tensor.shape)), f"{tensor.bytes:,}", str(len(tensor.shards)))
        console.print(table, markup=False)


@app.command()
def verify(path: Checkpoint) -> None:
    """Read all of a checkpoint: checksums, finite values, nothing missing; exit code 2 if something is wrong.

    Of a run's folder, the newest checkpoint is read, usable or not.
    """
    from rich.filesize import decimal

    from w2vscale.checkpoint.inspection import verify as verify_checkpoint
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.errors import UserError

    with progress_bar("reading (MiB)") as progress:
        found = verify_checkpoint(path, progress=lambda done, total: progress(done >> 20, total >> 20))
    checkpoint, problems = found.checkpoint, found.problems
    for problem in problems[1:20]:
        console.print(problem, markup=False)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{checkpoint.path}: {problems[0]}{more}")
    console.print(
        f"OK {checkpoint.path}: update {checkpoint.state.update}, {found.tensors} tensors, "
        f"{len(checkpoint.files)} files, {decimal(checkpoint.bytes)}",
        markup=False,
    )


@app.command()
def consolidate(
    path: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; model.safetensors and config.yaml.")],
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Also the optimizer's state; names then are the checkpoint's own.")
    ] = False,
) -> None:
    """Write one file of whole fp32 tensors, and the settings.

    The tensors have the names of the model's parameters (NAME). With --optimizer they are named as in the checkpoint:
    model.NAME, optim.NAME.exp_avg, optim.NAME.exp_avg_sq and optim.NAME.step.
    """
    from rich.filesize import decimal

    from w2vscale.checkpoint.consolidation import consolidate as consolidate_checkpoint
    from w2vscale.cli.progress import console, progress_bar

    with progress_bar("writing") as progress:
        found = consolidate_checkpoint(
            path, output, optimizer=optimizer, progress=progress, log=partial(console.print, markup=False)
        )
    console.print(f"{found.file}: update {found.update}, {found.tensors} tensors, {decimal(found.bytes)}", markup=False)


@app.command()
def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder for the mean: a checkpoint without optimizer.")
    ],
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Average the newest.")] = None,
    best: Annotated[int | None, typer.Option(min=1, metavar="N", help="Average the best in validation.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="With --best: a figure of validations; the lowest are best, of accuracy the highest.",
            show_default="loss",
            metavar="FIGURE",
        ),
    ] = None,
) -> None:
    """Write the mean of the weights of a run's last or best checkpoints.

    checkpoint.keep_last, keep_every and keep_best say which checkpoints a run keeps.
    """
    from w2vscale.checkpoint.averaging import average as average_checkpoints
    from w2vscale.cli.progress import console, progress_bar

    with progress_bar("averaging") as progress:
        found = average_checkpoints(
            run,
            output,
            last=last,
            best=best,
            metric=metric,
            progress=progress,
            log=partial(console.print, markup=False),
        )
    for update in found.updates:
        figure = f": {found.metric} {found.figures[update]:.6g}" if found.metric else ""
        console.print(f"update {update}{figure}", markup=False)
    count = len(found.updates)
    console.print(f"{found.checkpoint}: the mean of {count} checkpoint{'s' * (count > 1)}", markup=False)
