"""`w2vscale train` and `w2vscale finetune`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from w2vscale.cli.arguments import Exp, Overrides, Processes, Quiet, Resume, Source, Verbose, launch_if_asked
from w2vscale.cli.progress import console, print_table
from w2vscale.errors import UserError, counted

if TYPE_CHECKING:
    from w2vscale.config import Config
    from w2vscale.training.display import Verbosity
    from w2vscale.training.dry_run import DryRun

SCRATCH = "Train a baseline from random weights, with the architecture of trainer.init_from and nothing frozen."


def train(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    exp: Exp = None,
    resume: Resume = "auto",
    nproc_per_node: Processes = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run only the largest forward, backward and a step; print shapes, loss and memory."
        ),
    ] = False,
) -> None:
    """Train a model. The same command starts a run and resumes it.

    Example: w2vscale train base data.train=cuts_train.jsonl batch.micro_batches=32 --exp exp/base
    """
    verbosity = _verbosity(quiet, verbose)
    folder = None if dry_run else free_folder(source, exp, context)
    from w2vscale.objectives.settings import load_settings

    config = load_settings(source, overrides or [])
    if folder is not None:
        _check_early(config, folder, resume, verbosity)
    launch_if_asked(context, nproc_per_node, grace=config.checkpoint.grace_seconds)
    if folder is None:
        from w2vscale import runtime
        from w2vscale.training.dry_run import dry_run as run_dry

        runtime.prepare_process(compile=config.engine.compile)
        if found := run_dry(config, partial(console.print, markup=False)):
            _print_dry_run(found)
    else:
        _run(config, folder, resume, context, verbosity)


def finetune(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    exp: Exp = None,
    resume: Resume = "auto",
    scratch: Annotated[bool, typer.Option("--scratch", help=SCRATCH)] = False,
    nproc_per_node: Processes = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune for speech recognition with CTC. The same command starts a run and resumes it.

    The model has the architecture of trainer.init_from.

    Example: w2vscale finetune ctc_1h trainer.init_from=exp/base data.train=cuts_1h.jsonl --exp exp/base_1h
    """
    verbosity = _verbosity(quiet, verbose)
    folder = free_folder(source, exp, context)
    from w2vscale.objectives.settings import load_settings

    config = load_settings(source, overrides or [])
    _check_early(config, folder, resume, verbosity, fine_tuned=not scratch)
    launch_if_asked(context, nproc_per_node, grace=config.checkpoint.grace_seconds)
    from w2vscale.training.run import stored_settings
    from w2vscale.training.warm_start import fine_tuning_config

    stored = stored_settings(folder, resume, config.checkpoint.store)
    config = fine_tuning_config(config, scratch=scratch, stored=stored)
    _run(config, folder, resume, context, verbosity)


def replay(
    window: Annotated[
        Path, typer.Argument(metavar="WINDOW", help="What a run kept: EXP/nonfinite, or one file window_… in it.")
    ],
    overrides: Overrides = None,
) -> None:
    """Run the micro-batches of a skipped update again on the CPU, and name the first module that is not finite.

    A run keeps them when it stops after trainer.max_skipped_in_a_row updates whose gradients are not finite.
    """
    from w2vscale.training.replay import describe, kept_windows
    from w2vscale.training.replay import replay as replay_window

    for file in kept_windows(window):
        line = describe(replay_window(file, overrides or []))
        console.print(line if file == window else f"{file.name}: {line}")


def free_folder(source: str, exp: Path | None, context: typer.Context) -> Path:
    """The folder of the run, see `run_folder`. Raises UserError if another run uses it, before the slow imports.

    Raises UnicodeEncodeError if an argument is not UTF-8, as run.sh is.
    """
    from w2vscale.checkpoint.lock import refuse_if_locked
    from w2vscale.distributed.launch import launched

    for argument in context.obj or ():
        argument.encode()
        if argument in ("", "--exp="):
            raise UserError("an argument is empty; is a variable of the shell not set?")
    folder = run_folder(source, exp)
    if not launched():
        refuse_if_locked(folder)
    return folder


def run_folder(source: str, exp: Path | None) -> Path:
    """The folder of the run: `exp`, or the run that `source` is, or exp/NAME for a preset or a file.

    Raises UserError if `source` is the folder of a checkpoint, which does not say where a run belongs.
    """
    from w2vscale.config import preset_names

    path = Path(source)
    if exp is not None:
        return exp
    if source in preset_names() or not path.is_dir():
        return Path("exp") / (path.stem if path.suffix in (".yaml", ".yml") else path.name)
    if (path / "train_state.json").is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{source}: not the folder of a run; choose one with --exp")
    return path


def _verbosity(quiet: bool, verbose: bool) -> Verbosity:
    if quiet and verbose:
        raise UserError("--quiet and --verbose: choose one of them")
    return "quiet" if quiet else "verbose" if verbose else "normal"


def _check_early(config: Config, exp: Path, resume: str, verbosity: Verbosity, *, fine_tuned: bool = False) -> None:
    """Exit if the run has nothing to do. Raises UserError if a manifest is missing. Before processes and slow imports.

    The processes of a launcher, which may be on several machines, do so together later.
    """
    from w2vscale.data.manifest import check_manifests
    from w2vscale.distributed.launch import launched
    from w2vscale.training.finished import finished_run

    if launched():
        return
    if resume == "auto" and (line := finished_run(config, exp, console.print, fine_tuned=fine_tuned)) is not None:
        if verbosity != "quiet":
            console.print(line)
        sys.exit(0)
    check_manifests(config.data)


def _run(config: Config, exp: Path, resume: str, context: typer.Context, verbosity: Verbosity) -> NoReturn:
    from w2vscale import runtime
    from w2vscale.training.train import train

    between_steps = runtime.collected_between_steps
    with runtime.training(compile=config.engine.compile) as stop:
        code = train(
            config, exp, resume=resume, command=context.obj, stop=stop, verbosity=verbosity,
            around_updates=between_steps, began=runtime.STARTED,
        )  # fmt: skip
    sys.exit(code)


def _print_dry_run(found: DryRun) -> None:
    time = f"time of {counted(found.forwards, 'forward')} with backward, and a step"
    if found.compiled:
        time += "; with compilation"
    rows = [(f"parameters in {name}", f"{count:,}") for name, count in found.parameters.items()]
    rows.append(("parameters", f"{sum(found.parameters.values()):,}"))
    rows += [(name, " x ".join(f"{size:,}" for size in shape)) for name, shape in found.shapes.items()]
    rows += [
        ("micro-batches per series, per forward", f"{found.per_series:,}, {found.per_forward:,}"),
        ("weight in the loss (masked frames, or labels)", f"{found.weight:,}"),
        ("loss per unit of weight", f"{found.loss:.3f} nats"),
        ("gradient norm", f"{found.grad_norm:.3f}"),
        (time, f"{found.seconds:.2f} s"),
        ("peak memory", f"{found.peak_memory_bytes / 2**30:.2f} GiB"),
    ]
    if found.predicted_bytes is not None:
        rows.append(("peak memory of tensors, predicted", f"{found.predicted_bytes / 2**30:.2f} GiB"))
    seen = found.exposure
    rows += [
        ("micro-batches per epoch", f"{found.micro_batches_per_epoch:,}"),
        ("hours of audio per update", f"{seen.hours_per_update:,.3g}"),
        ("updates, epochs, hours of audio in all", f"{seen.updates:,}, {seen.epochs:,.1f}, {seen.hours:,.0f}"),
    ]
    print_table(("", ""), rows, title="dry run: the largest forward and its backward")
