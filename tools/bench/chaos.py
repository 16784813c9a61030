"""Kill a training run again and again, and compare it with one that nobody touched.

    python tools/bench/chaos.py --kills 100
    python tools/bench/chaos.py --kills 20 --engine fsdp

Each time, the same command starts the run or continues it: a launcher, two ranks and a loader process for each. At a
moment that depends on the progress of the run, one of them or all get SIGKILL. Then everything must be gone, and in the
end the weights and the optimizer state must be those of the untouched run, bit for bit.

By default checkpoints are written while training waits, so a kill loses at most one interval between checkpoints. With
--asynchronous they are written in the background, and a kill while one is written also loses the updates made since.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.launched import children
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import running
from tools.bench.script import console, run_script
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.verification import verify
from w2vscale.errors import UserError
from w2vscale.files import read_records

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"ddp": "name: ddp", "fsdp": "name: fsdp", "zero2": "name: deepspeed, deepspeed_config: zero2"}
EVERY = 5  # updates between checkpoints
PHASES = ("start-up", "load", "update", "collective", "save")
VICTIMS = ("rank", "loader", "launcher", "all")
MARK = "W2VSCALE_CHAOS"  # in the environment of all processes of a run, to find those that are left
DEADLINE = 120.0  # seconds


@dataclass
class Chaos:
    """A run that is killed, and what was seen."""

    folder: Path
    command: list[str]
    choose: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    mark: str = ""

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}-{self.folder.name}"
        self.exp = self.folder / "exp"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True)

    def start(self, log: str = "log.txt") -> subprocess.Popen[bytes]:
        """Start the run or continue it."""
        environment = os.environ | {
            MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary),
        }  # fmt: skip
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(self.command, env=environment, stdout=output, stderr=output)

    def updates(self) -> int:
        """The last update in the metrics."""
        path = self.exp / "metrics.jsonl"
        return max((line["update"] for line in read_records(path)), default=0) if path.is_file() else 0

    def kill_once(self) -> bool:
        """Start, wait for a moment, and kill. Returns False if the run ended before."""
        phase, victim = self.choose.choice(PHASES), self.choose.choice(VICTIMS)
        before = self.updates()
        process = self.start()
        if not self._wait(process, phase, before):
            return False
        processes = descendants(process.pid)
        targets = self._targets(processes, victim)
        reached = self.updates() if phase not in ("start-up", "load") else before
        for target in targets:
            with suppress(OSError):
                os.kill(target, signal.SIGKILL)
        process.wait(DEADLINE)
        # Processes that the launcher started in the meantime are not in the list, but have the mark.
        deadline = time.monotonic() + 20.0
        while found := [p for p in {*processes, *marked(self.mark)} if running(p)]:
            if time.monotonic() > deadline:
                self.left.append(f"{phase}, {victim}: {len(found)} processes")
                for one in found:
                    with suppress(OSError):
                        os.kill(one, signal.SIGKILL)
                break
            time.sleep(0.05)
        self.kills[f"{phase}: {victim if targets else 'nothing'}"] += 1
        self.lost.append(reached - self._resumable())
        return True

    def _targets(self, processes: list[int], victim: str) -> list[int]:
        launcher, ranks = processes[0], children(processes[0])
        loaders = [process for rank in ranks for process in children(rank)]
        if victim == "all" or (victim == "loader" and not loaders) or (victim == "rank" and not ranks):
            return [launcher, *ranks, *loaders]
        if victim == "launcher":
            return [launcher]
        return [self.choose.choice(ranks if victim == "rank" else loaders)]

    def _wait(self, process: subprocess.Popen[bytes], phase: str, before: int) -> bool:
        """Wait for the moment of a phase. Returns False if the run ends before."""

        def until(reached: Callable[[], bool]) -> bool:
            deadline = time.monotonic() + DEADLINE
            while not reached():
                if process.poll() is not None:
                    return False
                if time.monotonic() > deadline:
                    raise UserError(f"{self.folder}: no progress in {DEADLINE:g} s while waiting for: {phase}")
                time.sleep(0.002)
            return True

        if phase == "start-up":
            time.sleep(self.choose.uniform(0.0, 5.0))
            return process.poll() is None
        if phase == "load":
            lock, holder = self.exp / "lock", _read(self.exp / "lock")
            if not until(lambda: _read(lock) not in (b"", holder)):
                return False
            time.sleep(self.choose.uniform(0.0, 1.5))
            return process.poll() is None
        target = before + self.choose.randint(1, EVERY + 1)
        if not until(lambda: self.updates() >= target):
            return False
        if phase == "save":
            checkpoints = self.exp / "checkpoints"
            if not until(lambda: any(checkpoints.glob(".update_*.partial"))):
                return False
            time.sleep(self.choose.uniform(0.0, 0.1))
        if phase == "collective":
            time.sleep(self.choose.uniform(0.0, 0.2))
        return process.poll() is None

    def _resumable(self) -> int:
        try:
            return open_checkpoint(self.exp).state.update
        except UserError:
            return 0


def descendants(process: int) -> list[int]:
    """A process and everything that it has started."""
    found = [process]
    for one in found:
        found += children(one)
    return found


def marked(mark: str) -> list[int]:
    """The processes with this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def same(one: CheckpointReader, other: CheckpointReader) -> bool:
    """Whether two checkpoints hold the same bits."""
    return one.specs == other.specs and all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.specs)


def chaos(
    kills: Annotated[int, typer.Option(min=1, help="Number of kills.")] = 100,
    engine: Annotated[str, typer.Option(help=f"{', '.join(ENGINES)}.")] = "ddp",
    asynchronous: Annotated[bool, typer.Option("--asynchronous", help="Write checkpoints in the background.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for the moments and the processes that are killed.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder of the runs.")] = False,
) -> None:
    """Kill a run, continue it by the same command, and compare the result with an untouched run."""
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: choose {', '.join(ENGINES)}")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    shared_memory = set(os.listdir("/dev/shm"))
    try:
        found = _run(folder, kills, engine, asynchronous, seed)
    finally:
        if keep:
            console.print(str(folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    left = found["left"] = [
        *found["left"],
        *(f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared_memory),
    ]
    console.print(json.dumps(found))
    if not found["identical"] or left:
        sys.exit(1)


def _run(folder: Path, kills: int, engine: str, asynchronous: bool, seed: int) -> dict[str, Any]:
    cuts = [
        cut_of(write_audio(folder / "audio" / f"{number:02d}.flac", noise(1.0 + 0.2 * number, seed=number)))
        for number in range(24)
    ]
    corpus = write_manifest(folder / "cuts.jsonl", cuts)
    updates = 4 * kills + 2 * EVERY
    settings = [
        *MICRO_RUN, f"engine={{{ENGINES[engine]}}}", f"data.train={corpus}", f"data.validation={corpus}",
        f"trainer.updates={updates}", "trainer.validate_every=20", "data.workers=1", f"checkpoint.every={EVERY}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}", "logging.tensorboard=true", "watchdog.seconds=60",
    ]  # fmt: skip

    def run(name: str) -> Chaos:
        command = [sys.executable, "-m", "w2vscale", "train", "base", *settings, "--nproc-per-node", "2"]
        return Chaos(folder / name, [*command, "--exp", str(folder / name / "exp")], random.Random(seed))

    untouched, killed = run("untouched"), run("killed")
    if untouched.start().wait(60 + 2 * updates):
        raise UserError((untouched.folder / "log.txt").read_text())
    for _ in track(range(kills), description=f"kills ({engine})", console=console, transient=True):
        if not killed.kill_once():
            code = (killed.folder / "log.txt").read_text()[-2000:]
            raise UserError(f"the run ended after {killed.kills.total()} of {kills} kills: {code}")
    if killed.start().wait(60 + 2 * updates):
        raise UserError((killed.folder / "log.txt").read_text()[-2000:])
    log = (killed.folder / "log.txt").read_text()
    if "Traceback" in log:
        killed.left.append(log[log.index("Traceback") :][:2000])
    leftovers = [*killed.temporary.iterdir(), *killed.exp.rglob(".*.partial"), *killed.exp.glob("lock")]
    killed.left += [path.name for path in leftovers]
    problems = verify(killed.exp).problems
    identical = not problems and same(open_checkpoint(untouched.exp), open_checkpoint(killed.exp))
    curves = [read_records(one.exp / "metrics.jsonl") for one in (untouched, killed)]
    losses = [[(line["split"], line["update"], line["loss"]) for line in curve] for curve in curves]
    _print(killed)
    return {
        "kills": killed.kills.total(),
        "identical": identical and losses[0] == losses[1],
        "updates_lost_max": max(killed.lost),
        "by_phase": dict(sorted(killed.kills.items())),
        "engine": engine,
        "asynchronous": asynchronous,
        "left": killed.left,
    }


def _print(killed: Chaos) -> None:
    table = Table("phase", *VICTIMS, box=None)
    for phase in PHASES:
        table.add_row(phase, *(str(killed.kills[f"{phase}: {victim}"]) for victim in VICTIMS))
    console.print(table)
    mean = sum(killed.lost) / len(killed.lost)
    console.print(f"updates lost per kill: {max(killed.lost)} at most, {mean:.1f} on average")


if __name__ == "__main__":
    run_script(chaos)
