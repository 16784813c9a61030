"""Kill a training run again and again, and compare it with one that nobody touched.

    python tools/bench/chaos.py --kills 100
    python tools/bench/chaos.py --kills 20 --engine fsdp

Each time, the same command starts the run or continues it: a launcher, two ranks and a loader process for each. Each
rank notes in a file what it is doing. When it does what was drawn, one of the processes or all get SIGKILL; what the
files say afterwards is counted. Then everything must be gone, and the exit code must be one that docs/interruptions.md
explains. In the end the weights and the optimizer state must be those of the untouched run, bit for bit.

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
from w2vscale.errors import TemporaryError, UserError
from w2vscale.files import read_records

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"ddp": "name: ddp", "fsdp": "name: fsdp", "zero2": "name: deepspeed, deepspeed_config: zero2"}
EVERY = 5  # updates between checkpoints
PHASES = ("start-up", "load", "update", "collective", "save")
VICTIMS = ("rank", "loader", "launcher", "all")
CODES = {-signal.SIGKILL: "killed", 128 + signal.SIGKILL: "137", TemporaryError.exit_code: "75"}
MARK = "W2VSCALE_CHAOS"  # in the environment of all processes of a run, to find those that are left
DEADLINE = 120.0  # seconds

NOTES = """
import os
import threading

if "RANK" in os.environ and "PHASES" in os.environ:
    import torch.distributed as dist

    from w2vscale.checkpoint.reader import CheckpointReader
    from w2vscale.checkpoint.store import CheckpointStore
    from w2vscale.training.loop import Trainer

    notes = os.open(os.path.join(os.environ["PHASES"], os.environ["RANK"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    now = ["start-up", ""]  # in the training itself, and in the thread that writes checkpoints

    def noted(owner, name, phase):
        function = getattr(owner, name)

        def noting(*arguments, **settings):
            slot = int(threading.current_thread() is not threading.main_thread())
            before = now[slot]
            if phase != "collective" or before == "update":
                now[slot] = phase
                os.pwrite(notes, phase.ljust(16).encode(), 16 * slot)
            try:
                return function(*arguments, **settings)
            finally:
                if now[slot] != before:
                    now[slot] = before
                    os.pwrite(notes, before.ljust(16).encode(), 16 * slot)

        setattr(owner, name, noting)

    noted(CheckpointStore, "find", "load")
    noted(CheckpointReader, "read_into", "load")
    noted(CheckpointStore, "_write", "save")
    noted(Trainer, "_update", "update")
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        noted(dist, name, "collective")
"""
"""What the ranks of a run do besides training, as a `sitecustomize`: a module that Python runs before the program."""


@dataclass
class Chaos:
    """A run that is killed, and what was seen."""

    folder: Path
    command: list[str]
    choose: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    mark: str = ""

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}-{self.folder.name}"
        self.exp = self.folder / "exp"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.phases = self.folder / "phases"
        self.phases.mkdir()
        (self.folder / "sitecustomize.py").write_text(NOTES)

    def start(self, log: str = "log.txt") -> subprocess.Popen[bytes]:
        """Start the run or continue it."""
        environment = os.environ | {
            MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            "TMPDIR": str(self.temporary), "PHASES": str(self.phases),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),  # PyTorch makes it in TMPDIR otherwise
        }  # fmt: skip
        for notes in self.phases.iterdir():
            notes.unlink()
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(self.command, env=environment, stdout=output, stderr=output)

    def updates(self) -> int:
        """The last update in the metrics."""
        path = self.exp / "metrics.jsonl"
        return max((line["update"] for line in read_records(path)), default=0) if path.is_file() else 0

    def kill_once(self) -> bool:
        """Start, wait for a moment, and kill. Returns False if the run ended before."""
        phase, rank = self.choose.choice(PHASES), self.choose.randrange(2)
        process = self.start()
        if not self._wait(process, phase, rank):
            return False
        processes = descendants(process.pid)
        victim, targets = self._targets(processes, self.choose.choice(VICTIMS), rank)
        for target in targets:
            with suppress(OSError):
                os.kill(target, signal.SIGKILL)
        hit = self.phase(rank)
        code = process.wait(DEADLINE)
        self.codes[CODES.get(code, str(code))] += 1
        if code not in CODES:
            self.left.append(f"{hit}, {victim}: exit code {code}")
        # Processes that the launcher started in the meantime are not in the list, but have the mark.
        deadline = time.monotonic() + 20.0
        while found := [p for p in {*processes, *marked(self.mark)} if running(p)]:
            if time.monotonic() > deadline:
                self.left.append(f"{hit}, {victim}: {len(found)} processes")
                for one in found:
                    with suppress(OSError):
                        os.kill(one, signal.SIGKILL)
                break
            time.sleep(0.05)
        self.kills[f"{hit}: {victim}"] += 1
        # Before its first update a run has nothing to lose; the metrics may still hold what an earlier kill has cost.
        self.lost.append(self.updates() - self._resumable() if hit not in ("start-up", "load") else 0)
        return True

    def phase(self, rank: int) -> str:
        """What a rank is doing, or was when it was killed."""
        try:
            notes = (self.phases / str(rank)).read_text()
        except OSError:
            return "start-up"
        return notes[16:].strip() or notes[:16].strip() or "start-up"

    def _targets(self, processes: list[int], victim: str, rank: int) -> tuple[str, list[int]]:
        """What to kill. It is everything if there is no such process yet."""
        launcher, ranks = processes[0], ranks_of(processes[0])
        match victim:
            case "launcher":
                return victim, [launcher]
            case "rank" if rank in ranks:
                return victim, [ranks[rank]]
            case "loader" if rank in ranks and (loaders := children(ranks[rank])):
                return victim, loaders[:1]
        return "all", processes

    def _wait(self, process: subprocess.Popen[bytes], phase: str, rank: int) -> bool:
        """Wait until a rank is in this phase. Returns False if the run ends before."""
        if phase == "start-up":
            time.sleep(self.choose.uniform(0.0, 5.0))
            return process.poll() is None
        updates, first = self.choose.randint(1, EVERY + 1), None
        deadline = time.monotonic() + DEADLINE
        while process.poll() is None:
            now = self.phase(rank)
            if first is None and now not in ("start-up", "load"):
                first = self.updates()
            if now == phase and (phase == "load" or (first is not None and self.updates() >= first + updates)):
                return True
            if time.monotonic() > deadline:
                raise UserError(f"{self.folder}: no progress in {DEADLINE:g} s while waiting for: {phase}")
            if phase != "collective":
                time.sleep(0.002)
        return False

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


def ranks_of(launcher: int) -> dict[int, int]:
    """The process of each rank that a launcher has started."""
    found = {}
    for process in children(launcher):
        for each in _read(Path(f"/proc/{process}/environ")).split(b"\0"):
            if each.startswith(b"RANK="):
                found[int(each[5:])] = process
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
    allowed = 2 * EVERY if asynchronous else EVERY
    if not found["identical"] or left or found["updates_lost_max"] > allowed:
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
        "exit_codes": dict(sorted(killed.codes.items())),
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
