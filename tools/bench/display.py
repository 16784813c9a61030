"""What display and loggers cost: the share of a run of `tiny` that is spent on lines, the progress bar and logs.

    python tools/bench/display.py
    python tools/bench/display.py --preset base --updates 20

One run on noise with the settings of the preset, on a terminal (a pseudo-terminal of 100 columns), with TensorBoard and
metrics.jsonl. The time inside of display and loggers is measured by the clock; that of the thread that draws the bar is
its CPU time. Start-up, also that of TensorBoard, validation and saving are not part of the run's time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from rich.live import Live
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tools.bench.script import console, run_script
from w2vscale import runtime
from w2vscale.config import load_config
from w2vscale.loggers.fan_out import Loggers
from w2vscale.training.display import Display
from w2vscale.training.loop import Trainer
from w2vscale.training.train import train

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Seconds by what they were spent on. Calls inside of measured calls count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = threading.local()

    def measured(self, kind: str, function: Callable[..., Any], now: Callable[[], float]) -> Callable[..., Any]:
        """Return the function, with its time added to `kind`."""

        @wraps(function)
        def call(*arguments: Any, **settings: Any) -> Any:
            if getattr(self._inside, "kind", None) is not None:
                return function(*arguments, **settings)
            self._inside.kind, began = kind, now()
            try:
                return function(*arguments, **settings)
            finally:
                self._inside.kind = None
                self.seconds[kind] = self.seconds.get(kind, 0.0) + now() - began

        return call


def main(
    preset: Annotated[str, typer.Option(help="Preset for pretraining.")] = "tiny",
    updates: Annotated[int, typer.Option(min=1, help="Updates of the run.")] = 100,
    folder: Annotated[Path, typer.Option(help="For the run; deleted first.")] = ROOT / "exp" / "bench" / "display",
) -> None:
    """Measure, print a table, and JSON as the last line."""
    shutil.rmtree(folder, ignore_errors=True)
    cuts = [
        cut_of(write_audio(folder / "audio" / f"{number}.flac", noise(2.0 + 0.05 * number, seed=number)))
        for number in range(64)
    ]
    settings = [f"data.train={write_manifest(folder / 'cuts.jsonl', cuts)}", f"trainer.updates={updates}"]
    settings += ["schedule.warmup_updates=1", f"checkpoint.every={updates}", "precision.compute=fp32"]
    SummaryWriter(folder / "first").close()  # what it imports takes a second, once
    clock = Clock()
    with measuring(clock), on_a_terminal(), runtime.training() as stop:
        train(load_config(preset, settings), folder / "run", stop=stop)
    total = clock.seconds.pop("updates")
    table = Table("", "seconds", "share", title=f"{updates} updates of {preset}", box=None)
    for name, seconds in clock.seconds.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:.2%}")
    table.add_row("updates", f"{total:.3f}", "")
    console.print(table)
    share = sum(clock.seconds.values()) / total
    print(json.dumps({"share": share, "updates_seconds": total, **clock.seconds}))


@contextmanager
def measuring(clock: Clock) -> Any:
    """Measure display, loggers and updates in the block."""
    wall, thread = time.perf_counter, time.thread_time
    places = [
        (Trainer, "updates", wall, ("_update",)),
        (Display, "display", wall, ("training", "advance", "message", "finding", "detail")),
        (Loggers, "", wall, ("write", "text", "commit", "histogram", "show")),
    ]
    with patch.object(Live, "refresh", clock.measured("progress bar", Live.refresh, thread)):
        patches = [
            patch.object(owner, name, clock.measured(kind or f"loggers: {name}", getattr(owner, name), now))
            for owner, kind, now, names in places
            for name in names
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


@contextmanager
def on_a_terminal() -> Any:
    """Standard output is a terminal in the block; another thread reads what it shows."""
    ours, theirs = os.openpty()
    reader = threading.Thread(target=read_all, args=(ours,), daemon=True)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, patch.dict(os.environ, {"COLUMNS": "100", "TERM": "xterm-256color"}):
        with redirect_stdout(terminal):
            yield
        terminal.flush()


def read_all(descriptor: int) -> None:
    """Read until the other end is closed."""
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:  # how the end of a pseudo-terminal is reported
        os.close(descriptor)


if __name__ == "__main__":
    run_script(main)
