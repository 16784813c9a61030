"""The `w2vscale` command: subcommands, error output and exit codes."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import runpy
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from w2vscale import interrupts, runtime
from w2vscale.cli import analysis, checkpoint, config, convert, data, doctor, evaluate, inference, plan, train
from w2vscale.cli.arguments import check_dashes
from w2vscale.distributed.launch import LostRanks, launched
from w2vscale.errors import UserError
from w2vscale.files import nearest_path
from w2vscale.terminal import visible
from w2vscale.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.command()(plan.plan)
app.command()(train.train)
app.command()(train.finetune)
app.command()(train.replay)
app.command()(evaluate.evaluate)
app.command()(inference.transcribe)
app.command()(analysis.probe)
app.command()(inference.features)
app.command()(analysis.report)
app.command()(evaluate.results)
app.command()(convert.export)
app.command("import")(convert.import_)
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions of w2vscale, PyTorch and its CUDA.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Scalable pretraining of wav2vec 2.0."""
    if version:
        typer.echo(f"w2vscale {__version__}, {_torch_version()}")
        raise typer.Exit


def _torch_version() -> str:
    """The version of PyTorch and of the CUDA or ROCm that it was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed"
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    built_for = [f"{name} {facts[key]}" for name, key in (("CUDA", "cuda"), ("ROCm", "hip")) if facts.get(key)]
    return f"torch {facts['__version__']}, {built_for[0] if built_for else 'built without CUDA'}"


def main() -> None:
    """Run the command line. A user error prints one line and exits with code 2."""
    given = sys.argv[1:]
    # DeepSpeed's launcher adds it to the arguments; the variable LOCAL_RANK says the same.
    by_deepspeed = [argument for argument in given if re.fullmatch(r"--local[_-]rank=\d+", argument)]
    arguments = [argument for argument in given if argument not in ("--debug", *by_deepspeed)]
    runtime.enter(debug="--debug" in given, launched=bool(by_deepspeed))
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # a stream that was redirected may refuse
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        with _file_errors():
            check_dashes(arguments)
            app(args=arguments, prog_name="w2vscale", obj=arguments)
    except KeyboardInterrupt:
        sys.exit(interrupts.EXIT_CODE)
    except Exception as error:
        if interrupts.asked():  # a library or a worker process has made another error of it
            interrupts.leave()
        debug = runtime.DEBUG in os.environ
        if not launched() and (debug or not isinstance(error, UserError)):
            raise
        _leave(error, rank=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")), debug=debug)


@contextmanager
def _file_errors() -> Iterator[None]:
    """Turn an error about a file, its name or its size, which no part of a command has expected, into a UserError."""
    try:
        yield
    except UnicodeEncodeError as error:  # Python has half a surrogate pair for each byte that is not UTF-8
        text = error.object[max(error.start - 40, 0) : error.end + 40]
        raise UserError(f"{text!r}: cannot be written, because it is not UTF-8; choose another name") from error
    except MemoryError as error:
        raise UserError("the memory of this machine is not enough for this command and its files") from error
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the output cannot be written: {error.strerror}") from error
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename)
        raise UserError(f"{name}: {error.strerror}{nearest_path(name)}") from error


def _leave(error: Exception, *, rank: str, debug: bool) -> NoReturn:
    """Print the error and exit without clean-up, which could wait for other ranks."""
    user = isinstance(error, UserError)
    if isinstance(error, LostRanks) and not debug:
        # The message of gloo or NCCL, without source location and advice.
        reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        text = f"rank {rank}: lost the other processes ({reason})\n"
    elif user and not debug:
        text = f"error: {visible(' '.join(str(error).splitlines()))}\n"
    else:
        text = textwrap.indent("".join(traceback.format_exception(error)), f"[rank {rank}] ", lambda line: True)
    try:
        if isinstance(error, LostRanks) or (user and rank != "0"):
            # Usually another rank prints the cause or the same error, and then the launcher stops this process.
            time.sleep(3.0)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    finally:
        os._exit(error.exit_code if isinstance(error, UserError) else 1)
