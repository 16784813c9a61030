"""Train for a while with a checkpoint every few updates, and see whether memory, files, threads or the rate creep.

    python tools/bench/soak.py --minutes 20

Two ranks with a loader process each, checkpoints in the background, validation now and then. Every five seconds their
resident memory, open files and threads are read from /proc. The table compares the second fifth of the time with the
last one: the first fifth is for caches to fill.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.launched import children
from tests.helpers.micro import MICRO_RUN
from tools.bench.chaos import ENGINES
from tools.bench.script import console, run_script
from w2vscale.errors import UserError
from w2vscale.files import read_metrics

ROOT = Path(__file__).resolve().parents[2]
EVERY = 5.0  # seconds between samples
GROWTH = 1.05  # from the second fifth to the last one; more is a leak


class Sample(NamedTuple):
    """What all processes of a run use together."""

    mib: float
    files: int
    threads: int
    updates: int


def soak(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 20.0,
    engine: Annotated[str, typer.Option(help=f"{', '.join(ENGINES)}.")] = "ddp",
) -> None:
    """Watch memory, open files, threads and the rate of a run that checkpoints every three updates."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        samples = _run(folder, minutes, engine)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fifth = len(samples) // 5
    if fifth < 2:
        raise UserError(f"--minutes {minutes:g}: too short to compare anything")
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    rows = {
        "memory (MiB)": [statistics.median(one.mib for one in part) for part in (early, late)],
        "open files": [statistics.median(one.files for one in part) for part in (early, late)],
        "threads": [statistics.median(one.threads for one in part) for part in (early, late)],
        "updates per second": [
            (part[-1].updates - part[0].updates) / (EVERY * (len(part) - 1)) for part in (early, late)
        ],
    }
    table = Table("", "second fifth", "last fifth", "ratio", box=None)
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.3f}")
    console.print(table)
    ratios = {name.split(" (")[0]: round(after / before, 4) for name, (before, after) in rows.items()}
    console.print(json.dumps({"minutes": minutes, "updates": samples[-1].updates, "engine": engine, **ratios}))
    if max(ratios["memory"], ratios["open files"], ratios["threads"]) > GROWTH:
        sys.exit(1)


def _run(folder: Path, minutes: float, engine: str) -> list[Sample]:
    cuts = [
        cut_of(write_audio(folder / "audio" / f"{number:02d}.flac", noise(1.0 + 0.2 * number, seed=number)))
        for number in range(24)
    ]
    corpus, exp = write_manifest(folder / "cuts.jsonl", cuts), folder / "exp"
    settings = [
        *MICRO_RUN, f"engine={{{ENGINES[engine]}}}", f"data.train={corpus}", f"data.validation={corpus}",
        "trainer.updates=1000000", "trainer.validate_every=50", "data.workers=1", "checkpoint.every=3",
        "logging.tensorboard=true",
    ]  # fmt: skip
    command = [sys.executable, "-m", "w2vscale", "train", "base", *settings, "--exp", str(exp)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    samples: list[Sample] = []
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([*command, "--nproc-per-node", "2"], env=environment, stdout=log, stderr=log)
        try:
            while not (exp / "metrics.jsonl").is_file() and process.poll() is None:
                time.sleep(0.1)
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                if process.poll() is not None:
                    raise UserError((folder / "log.txt").read_text()[-2000:])
                samples.append(_sample(process.pid, exp))
                time.sleep(EVERY)
        finally:
            process.terminate()
            process.wait()
    return samples


def _sample(launcher: int, exp: Path) -> Sample:
    processes = [launcher]
    for process in processes:
        processes += children(process)
    pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return Sample(
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes),
        sum(len(os.listdir(f"/proc/{process}/task")) for process in processes),
        _last_update(read_metrics(exp / "metrics.jsonl", "train")),
    )


def _last_update(records: Sequence[dict[str, int]]) -> int:
    return records[-1]["update"] if records else 0


if __name__ == "__main__":
    run_script(soak)
