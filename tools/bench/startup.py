"""What it costs to start: CPU seconds of commands that have little or nothing to do, with all of their processes.

    python tools/bench/startup.py
    python tools/bench/startup.py --checkout ../other            the code of another checkout, on the same machine

The runs are of two updates of a model of 40,000 parameters, so almost all of their time is the start. CPU time is user
and system time of the process and its children; other work on the machine changes it much less than time on the clock.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.micro import MICRO_RUN
from tools.bench.script import console, run_script

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--help", "wrong setting", "nothing to do", "nothing to do, 2 processes", "export refused"]
"""Starts that are expected to import no large library."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each start runs, in turn with the others.")] = 3,
    checkout: Annotated[Path, typer.Option(help="Whose w2vscale to run.")] = ROOT,
    folder: Annotated[Path, typer.Option(help="For the runs; deleted first.")] = ROOT / "exp" / "bench" / "startup",
) -> None:
    """Measure, print a table, and JSON as the last line."""
    shutil.rmtree(folder, ignore_errors=True)
    commands = starts(folder, checkout)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, code) in commands.items():
            shutil.rmtree(folder / "new", ignore_errors=True)
            seconds[name].append(cpu_seconds(command, checkout, expected=code))
    median = {name: statistics.median(found) for name, found in seconds.items()}
    table = Table("start", "CPU seconds", "lowest", "highest", title=f"median of {rounds}", box=None)
    for name, found in seconds.items():
        table.add_row(name, f"{median[name]:.2f}", f"{min(found):.2f}", f"{max(found):.2f}")
    console.print(table)
    slowest = max(FAST, key=median.__getitem__)
    print(json.dumps({"nothing_to_do": median["nothing to do"], "slowest_fast": slowest, "cpu_seconds": median}))


def starts(folder: Path, checkout: Path) -> dict[str, tuple[list[str], int]]:
    """Arguments of Python and the exit code of each start, by name. Makes a corpus, and a finished run on it."""
    cuts = [
        cut_of(write_audio(folder / "audio" / f"{number}.flac", noise(2.0 + 0.1 * number, seed=number)))
        for number in range(12)
    ]
    manifest = write_manifest(folder / "cuts.jsonl", cuts)
    others = ("trainer.updates=", "schedule.warmup_updates=")
    settings = [text for text in MICRO_RUN if not text.startswith(others)]
    settings += [f"data.train={manifest}", "trainer.updates=2", "schedule.warmup_updates=1", "data.workers=1"]
    train = ["-m", "w2vscale", "train", "base", *settings, "--exp"]
    finished, used, new = str(folder / "finished"), folder / "used", str(folder / "new")
    cpu_seconds([*train, finished], checkout)
    used.mkdir()
    (used / "file").touch()
    two = ["--nproc-per-node", "2"]
    return {
        "import torch": (["-c", "import torch"], 0),
        "import torch._dynamo": (["-c", "import torch._dynamo"], 0),
        "import w2vscale": (["-c", "import w2vscale"], 0),
        "--help": (["-m", "w2vscale", "train", "--help"], 0),
        "wrong setting": ([*train, new, "optim.lrr=1"], 2),
        "nothing to do": ([*train, finished], 0),
        "nothing to do, 2 processes": ([*train, finished, *two], 0),
        "export refused": (["-m", "w2vscale", "export", finished, str(used)], 2),
        "checkpoint show": (["-m", "w2vscale", "checkpoint", "show", finished], 0),
        "export": (["-m", "w2vscale", "export", finished, new], 0),
        "2 updates, ddp": ([*train, new], 0),
        "2 updates, ddp, 2 processes": ([*train, new, *two], 0),
        "2 updates, fsdp, 2 processes": ([*train, new, "engine.name=fsdp", *two], 0),
    }


def cpu_seconds(arguments: list[str], checkout: Path, *, expected: int = 0) -> float:
    """User and system time of `python ARGUMENTS` and its children. RuntimeError if its exit code is not as expected."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, cwd=checkout
    )
    if done.returncode != expected:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    run_script(main)
