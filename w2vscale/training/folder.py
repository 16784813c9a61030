"""The folder of a run: its settings, and the script that repeats it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from w2vscale.config import Config, dump_config
from w2vscale.distributed.launch import local_processes
from w2vscale.distributed.process_group import Ranks, errors_on_all_ranks
from w2vscale.errors import UserError
from w2vscale.files import write_text


def make_folder(
    exp: Path, config: Config, ranks: Ranks, command: Sequence[str] | None, *, finished: bool = False
) -> None:
    """Create `exp/` with config.yaml and run.sh (see `run_script`). Collective.

    `command` are the arguments of `w2vscale` that started the run; None if it was started from Python. In the folder of
    a run that is `finished`, existing files stay, because they say how its model was made. Raises UserError on every
    rank if rank 0 cannot write the folder.
    """
    with errors_on_all_ranks():
        if ranks.is_main:
            try:
                (exp / "logs").mkdir(parents=True, exist_ok=True)
                (exp / "checkpoints").mkdir(exist_ok=True)
                if finished and (exp / "config.yaml").is_file() and (exp / "run.sh").is_file():
                    return
                write_text(exp / "config.yaml", dump_config(config))
                given = command or ["train", str((exp / "config.yaml").resolve()), "--exp", str(exp.resolve())]
                write_text(exp / "run.sh", run_script(given, ranks.world_size, local_processes(os.environ)))
                (exp / "run.sh").chmod(0o755)
            except (OSError, UserError) as error:
                reason = getattr(error, "strerror", None) or error
                place = getattr(error, "filename", None) or exp
                raise UserError(f"{place}: the folder of the run cannot be written: {reason}") from None


def run_script(command: Sequence[str], processes: int, here: int | None) -> str:
    """Return a script that runs `w2vscale` with the arguments `command` in the current folder, and continues the run.

    `processes` is the number of processes of the run, and `here` the number on this machine (None: unknown). If all are
    on this machine, the script starts them itself.
    """
    arguments, launcher = _without_option(command, "--resume"), ""
    if processes > 1 and processes != here:
        launcher = (
            f"# It has {processes} processes: start this script with their launcher (torchrun --no-python, srun, "
            "deepspeed --no_python).\n"
        )
    elif processes > 1 and _without_option(arguments, "--nproc-per-node") == arguments:
        arguments += ["--nproc-per-node", str(processes)]
    return (
        f"#!/usr/bin/env bash\n# Repeats this run, or continues it from its newest checkpoint.\n{launcher}"
        f"set -euo pipefail\ncd {shlex.quote(os.getcwd())}\n"
        f'{shlex.quote(sys.executable)} -m w2vscale {shlex.join(arguments)} "$@"\n'
    )


def _without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return the arguments without `option VALUE` and `option=VALUE`."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
