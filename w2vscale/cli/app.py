"""The `w2vscale` command: its subcommands, and how errors end it."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from w2vscale import __version__
from w2vscale.cli import config, data, evaluate, report, train
from w2vscale.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Scalable pretraining of wav2vec 2.0."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. An error that the user can mend is one line and exit code 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        os.environ["W2VSCALE_DEBUG"] = "1"  # for the processes that this one may start, too
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(args=arguments, prog_name="w2vscale")
    except UserError as error:
        if "W2VSCALE_DEBUG" in os.environ:
            raise
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            # Mostly all ranks meet the same error: once rank 0 has said it, the launcher ends the others.
            time.sleep(3.0)
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        # Without clean-up that could wait for other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
