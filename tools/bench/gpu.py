"""Measure a GPU: check correctness, measure speed and compare kernels, in one call of at most 9 minutes.

    python tools/bench/gpu.py --out DIR
    python tools/bench/gpu.py --out DIR --only rates_base --only rates_large
    python tools/bench/gpu.py --out DIR --device cpu --tiny         (used by the tests)

Each phase has a process and a time limit of its own. DIR/gpu.json is written again after each row, and DIR/PHASE.log
holds what the phase printed: a phase that fails or runs out of time loses only the rows that it had not measured yet.
With --only, the rows of other phases in DIR/gpu.json are kept. The last lines of the output rank the kernels.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tools.bench.phases.measuring import Machine, process_context
from tools.bench.phases.report import choices, headline, main_figures
from tools.bench.script import console, run_script
from w2vscale import runtime
from w2vscale.errors import UserError

MODULE = "tools.bench.phases"


@dataclass(frozen=True)
class Phase:
    """A part of the measurement: the generator of its rows, as module:function, and its time limit."""

    name: str
    target: str
    seconds: float


PHASES = (
    Phase("environment", f"{MODULE}.environment:environment", 40),
    Phase("correctness", f"{MODULE}.engines:correctness", 140),
    Phase("synchronisations", f"{MODULE}.engines:synchronisations", 70),
    Phase("rates_base", f"{MODULE}.rates:rates_base", 110),
    Phase("rates_large", f"{MODULE}.rates:rates_large", 110),
    Phase("transformers_base", f"{MODULE}.rates:transformers_base", 80),
    Phase("transformers_large", f"{MODULE}.rates:transformers_large", 100),
    Phase("changes", f"{MODULE}.changes:changes", 90),
    Phase("operations", f"{MODULE}.operations:operations", 70),
    Phase("profile", f"{MODULE}.rates:profile", 50),
    Phase("recompilations", f"{MODULE}.rates:recompilations", 60),
    Phase("new_shapes", f"{MODULE}.operations:new_shapes", 50),
    Phase("loader", f"{MODULE}.loading:loader", 60),
)
"""The most important first: the last ones may find no time left."""

PHASE_NAMES = [phase.name for phase in PHASES]


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="Output folder for gpu.json and the logs.")],
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="Device to measure.")] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use tiny models and few repetitions (about a minute on a CPU).")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHASE", help=f"Run only this phase; repeatable: {', '.join(PHASE_NAMES)}.", show_default="all"
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time limit of all phases together.")] = 9.0,
) -> None:
    """Measure a GPU and write DIR/gpu.json."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device}: not one of cuda, cpu", param_hint="--device")
    if unknown := [name for name in only or [] if name not in PHASE_NAMES]:
        raise typer.BadParameter(f"{unknown[0]}: not one of {', '.join(PHASE_NAMES)}", param_hint="--only")
    if device == "cuda" and not torch.cuda.device_count():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use; try --device cpu --tiny")
    chosen = [phase for phase in PHASES if not only or phase.name in only]
    if tiny:  # the limits are for a GPU; tests run beside others
        chosen = [replace(phase, seconds=4 * phase.seconds) for phase in chosen]
    document = run_phases(chosen, Machine(device, tiny), out, seconds=60 * minutes, keep=bool(only))
    print_report(document)
    print(json.dumps(headline(document)))
    if any(phase.name in document["failed"] for phase in chosen):
        sys.exit(1)


def run_phases(
    phases: Sequence[Phase], machine: Machine, out: Path, *, seconds: float, keep: bool = False
) -> dict[str, Any]:
    """Run phases one after the other for at most `seconds`; the document that is also in `out`/gpu.json.

    `document["phases"]` has the rows of each phase, `document["failed"]` the reasons of those that did not finish.
    `keep`: an earlier gpu.json of the same device keeps its other phases.

    Raises:
        UserError: `out` cannot be written, or holds a gpu.json that cannot be kept.
    """
    document: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"), "device": machine.device_name, "tiny": machine.tiny,
        "phases": {}, "seconds": {}, "failed": {},
    }  # fmt: skip
    file = out / "gpu.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(file.read_text()) if keep and file.exists() else document
        if (earlier["device"], earlier["tiny"]) != (machine.device_name, machine.tiny):
            raise UserError(f"{file}: measured with other options; choose another --out")
        document |= {key: dict(earlier[key]) for key in ("phases", "seconds", "failed")}
        if not keep:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}); choose another --out") from None
    for phase in phases:
        document["phases"][phase.name] = {}
        document["failed"].pop(phase.name, None)
    deadline = time.monotonic() + seconds
    for phase in phases:
        began = time.monotonic()
        limit = min(phase.seconds, deadline - began)
        console.print(f"{phase.name}: at most {max(limit, 0):.0f} s", markup=False)
        reason = _run_phase(phase, machine, out, limit, document) if limit > 0 else "no time was left"
        document["seconds"][phase.name] = round(time.monotonic() - began, 1)
        if reason is not None:
            document["failed"][phase.name] = reason
        _write(out, document)
        outcome = "done" if reason is None else f"FAILED: {reason}"
        if errors := sum(isinstance(row, dict) and "error" in row for row in document["phases"][phase.name].values()):
            outcome += f", {errors} of {len(document['phases'][phase.name])} rows have an error"
        console.print(f"{phase.name}: {outcome} ({document['seconds'][phase.name]:.0f} s)", markup=False)
    return document


def _run_phase(phase: Phase, machine: Machine, out: Path, limit: float, document: dict[str, Any]) -> str | None:
    """Run one phase in a process of its own; why it did not finish, or None."""
    deadline = time.monotonic() + limit
    context = process_context(machine)
    rows: multiprocessing.Queue[tuple[str, Any]] = context.Queue()
    log = out / f"{phase.name}.log"
    process = context.Process(target=_measure, args=(phase.target, machine, log, rows))
    process.start()
    try:
        while time.monotonic() < deadline:
            try:
                key, value = rows.get(timeout=0.1)
            except queue.Empty:
                if not process.is_alive() and rows.empty():
                    return f"its process ended with code {process.exitcode}, see {log.name}"
                continue
            if key == FINISHED:
                return value
            document["phases"][phase.name][key] = value
            _write(out, document)
        return f"ran out of time after {limit:.3g} s"
    finally:
        _end(process)


FINISHED = "finished"
"""The key of a phase's last row: the error that ended it, or None."""


def _measure(target: str, machine: Machine, log: Path, rows: Any) -> None:
    """In the phase's process: run it and send its rows."""
    runtime.end_with_parent()
    os.setsid()  # so that what it starts can be ended with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = output = log.open("w", buffering=1)
    for descriptor in (1, 2):  # also of what it starts, and of libraries
        os.dup2(output.fileno(), descriptor)
    module, _, function = target.partition(":")
    try:
        if machine.tiny:
            torch.set_num_threads(1)
        for row in getattr(importlib.import_module(module), function)(machine):
            rows.put(row)
    except Exception as error:  # whatever it is, the other phases go on
        traceback.print_exc()
        rows.put((FINISHED, f"{type(error).__name__}: {error}".splitlines()[0][:300]))
    else:
        rows.put((FINISHED, None))


def _end(process: Any) -> None:
    """End a phase's process and all that it started."""
    process.join(1)  # it may be about to end by itself
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _write(out: Path, document: Mapping[str, Any]) -> None:
    """Replace gpu.json; a reader never sees half of it."""
    document = {**document, **headline(document), "choices": choices(document)}
    partial = out / ".gpu.json.partial"
    partial.write_text(json.dumps(document, indent=1, default=str) + "\n")
    partial.replace(out / "gpu.json")


def print_report(document: Mapping[str, Any]) -> None:
    """Print the main figures, and what to choose on this device."""
    table = Table(title=f"{document['device']}, {document['started']}", box=None, title_justify="left")
    for heading in ("phase", "figure", "value"):
        table.add_column(heading)
    for phase, figure, value in main_figures(document):
        table.add_row(phase, figure, value)
    console.print(table)
    for choice, why in choices(document).items():
        console.print(f"{choice}: {why}", markup=False)


if __name__ == "__main__":
    run_script(main)
