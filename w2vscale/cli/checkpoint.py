"""`w2vscale checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from w2vscale.cli.arguments import Checkpoint, Weights
from w2vscale.cli.progress import bytes_bar, console, print_table
from w2vscale.errors import UserError, counted

app = typer.Typer(no_args_is_help=True, help="Inspect, verify, convert and average checkpoints.")


@app.command()
def show(
    path: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
) -> None:
    """Show what a checkpoint holds and how it was made."""
    from w2vscale.checkpoint.reader import open_checkpoint
    from w2vscale.optim.canonical import type_name

    checkpoint = open_checkpoint(path, console.print, hashed=False)
    state, model, engine = checkpoint.state, checkpoint.config.model, checkpoint.config.engine
    ranked = [one for one in dict.fromkeys(("loss", checkpoint.config.trainer.best_metric)) if one in state.validation]
    kinds = [name.partition(".")[0] for name in checkpoint.tensors]
    decay = f"optim.ema_decay={checkpoint.config.optim.ema_decay:g}"
    rows = [
        ("update", f"{state.update:,} of {checkpoint.config.trainer.updates:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.2f}"),
        *((f"validation {metric}", f"{state.validation[metric]:.6g}") for metric in ranked),
        ("data", state.data or "unknown"),
        ("skipped updates", f"{state.skipped_updates:,}"),
        ("skipped utterances", f"{state.skipped_utterances:,}"),
        ("skipped windows", f"{state.skipped_windows:,}"),
        ("parameters", f"{checkpoint.parameters:,}"),
        ("shape", f"{model.layers}x{model.dim}x{model.ffn_dim}x{model.heads} (layers x dim x ffn_dim x heads)"),
        (
            "written by",
            f"{engine.name}{f' {engine.deepspeed_config}' * (engine.name == 'deepspeed')}, "
            f"{checkpoint.ranks} process{'es' * (checkpoint.ranks > 1)}",
        ),
        ("tensors", f"{kinds.count('model'):,} of the model, {kinds.count('optim'):,} of the optimizer"),
        *([("averaged weights", f"{kinds.count('ema'):,} tensors, {decay}")] if checkpoint.has_average else []),
        ("files", f"{len(checkpoint.files):,}, {decimal(checkpoint.bytes)}"),
    ]
    print_table(("", ""), rows, title=str(checkpoint.path), right=False)
    if tensors:
        listed = []
        for name, tensor in sorted(checkpoint.tensors.items()):
            shape, size = "x".join(map(str, tensor.spec.shape)), f"{tensor.numel * tensor.spec.dtype.itemsize:,}"
            listed.append((name, shape, type_name(tensor.spec.dtype), size, str(len(tensor.slices))))
        print_table(("tensor", "shape", "type", "bytes", "slices"), listed)


@app.command()
def verify(path: Checkpoint) -> None:
    """Read all of a checkpoint and check that it is complete and undamaged.

    Checks the checksum of every file, that all values are finite, and that no tensor is missing.
    Prints what is wrong and exits with code 2 if anything is.
    In a run's folder, the newest checkpoint is read, even if it is unusable.
    """
    from w2vscale.checkpoint.verification import verify as verify_checkpoint

    with bytes_bar("reading") as progress:
        checkpoint, problems = verify_checkpoint(path, progress=progress)
    for problem in problems[1:20]:
        console.print(problem)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{checkpoint.path}: {problems[0]}{more}")
    console.print(
        f"OK {checkpoint.path}: update {checkpoint.state.update}, {len(checkpoint.tensors)} tensors, "
        f"{len(checkpoint.files)} files, {decimal(checkpoint.bytes)}"
    )


@app.command()
def consolidate(
    path: Checkpoint,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write model.safetensors and config.yaml to.")
    ],
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Include the optimizer state; name tensors as in the checkpoint.")
    ] = False,
    weights: Weights = None,
) -> None:
    """Write the model of a checkpoint to one file, with its settings.

    Tensors have the names of the model's parameters and buffers (NAME).
    With --optimizer: model.NAME, optim.NAME.exp_avg, optim.NAME.exp_avg_sq, optim.NAME.step and, with averaged weights,
    ema.NAME, as in the checkpoint.
    """
    from w2vscale.checkpoint.consolidation import consolidate as consolidate_checkpoint

    with bytes_bar("writing") as progress:
        found = consolidate_checkpoint(
            path, output, optimizer=optimizer, weights=weights, progress=progress, log=console.print
        )
    console.print(f"{found.file}: update {found.update}, {found.tensors} tensors, {decimal(found.file.stat().st_size)}")


@app.command()
def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the averaged checkpoint to.")],
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Average the N newest checkpoints.")] = None,
    best: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Average the N with the lowest trainer.best_metric.")
    ] = None,
    weights: Weights = None,
) -> None:
    """Average the weights of a run's newest or best checkpoints.

    The result is a checkpoint without optimizer state.
    The settings checkpoint.keep_last, keep_every and keep_best determine which checkpoints a run keeps.
    """
    from w2vscale.checkpoint.averaging import average as average_checkpoints

    with bytes_bar("averaging") as progress:
        found = average_checkpoints(
            run, output, last=last, best=best, weights=weights, progress=progress, log=console.print
        )
    for update, score in found.scores.items():
        console.print(f"update {update}{f': validation {found.metric} {score:.6g}' if best else ''}")
    console.print(f"{found.checkpoint}: the mean of {counted(len(found.scores), 'checkpoint')}")
