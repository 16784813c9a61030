"""Peaks of memory beside those that `w2vscale plan` predicts, for each engine on one process and on two.

    python tools/bench/plan_memory.py                                 tiny, base and large, in 12 GB of memory
    python tools/bench/plan_memory.py --preset tiny --engine ddp precision.compute=bf16

Each process trains for two updates of two micro-batches (tools/bench/engine_memory.py). A peak is what PyTorch has
allocated; the growth of resident memory stands beside it. The last line is JSON; `max_relative_error` is the largest
error of a predicted peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tools.bench.script import console, run_script
from w2vscale.errors import UserError
from w2vscale.planning import traffic

ROOT = Path(__file__).resolve().parents[2]

ENGINES = {name: f"engine={json.dumps(traffic.ENGINES[name])}" for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")}
"""Settings of each engine."""

PRESETS = ("tiny", "base", "large")

MEMORY_THAT_IS_FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which resident memory is what is in use."""


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Preset of the model; repeatable.", show_default=", ".join(PRESETS))
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(metavar="|".join(ENGINES), help="Engine; repeatable.", show_default="all")
    ] = None,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of processes; repeatable.", show_default="1 and 2")
    ] = None,
    utterances: Annotated[int, typer.Option(min=1, help="Utterances of a micro-batch.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.5, help="Seconds of audio of an utterance.")] = 2.5,
) -> None:
    """Compare measured peaks with predicted ones."""
    if unknown := [name for name in engine or [] if name not in ENGINES]:
        raise typer.BadParameter(f"{unknown[0]}: not one of {', '.join(ENGINES)}", param_hint="--engine")
    counts = processes or [1, *([2] if torch.cuda.device_count() != 1 else [])]
    work = ["--utterances", str(utterances), "--seconds", str(seconds)]
    rows: list[dict[str, Any]] = []
    for name in preset or PRESETS:
        for count in counts:
            for each in engine or ENGINES:
                figures = measure([*work, "--preset", name, ENGINES[each], *(settings or [])], processes=count)
                error = figures["predicted"] / figures["peak"] - 1
                rows.append({"preset": name, "processes": count, "engine": each, "error": error, **figures})
                print(f"{name}, {count}, {each}: {error:+.1%}", file=sys.stderr, flush=True)
    print_rows(rows)
    print(json.dumps({"max_relative_error": max(abs(row["error"]) for row in rows), "rows": rows}))


def measure(arguments: Sequence[str], *, processes: int) -> dict[str, Any]:
    """Return what tools/bench/engine_memory.py finds with these arguments.

    Raises UserError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*(torchrun if processes > 1 else []), str(Path(__file__).with_name("engine_memory.py"))]
        finished = subprocess.run(
            [sys.executable, *command, str(result), *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), **os.environ, "OMP_NUM_THREADS": "1", **MEMORY_THAT_IS_FREED_AT_ONCE},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if finished.returncode or not result.exists():
            raise UserError(f"engine_memory.py {' '.join(arguments)} failed:\n{finished.stderr[-3000:]}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of peaks in MB."""
    table = Table(box=None, header_style="bold", title="MB of the process that needs most", title_justify="left")
    for heading in ("preset", "processes", "engine", "peak", "predicted", "error", "resident"):
        table.add_column(heading, justify="left" if heading in ("preset", "engine") else "right")
    for row in rows:
        table.add_row(
            row["preset"],
            str(row["processes"]),
            row["engine"],
            *(f"{row[key] / 1e6:,.1f}" for key in ("peak", "predicted")),
            f"{row['error']:+.1%}",
            f"{row['resident_peak'] / 1e6:,.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    run_script(main)
