"""Measured points on one to three hosts with slow links, beside what the model predicts for them.

The hosts are network namespaces of this machine (tests/helpers/hosts.py), their links have a stated speed, and gloo
takes the place of NCCL. The device of each host is a process with one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.helpers.hosts import Hosts, missing_for_hosts
from tools.scaling.growth import preset_model
from w2vscale.errors import UserError
from w2vscale.planning.links import Cluster, Link
from w2vscale.planning.prediction import network
from w2vscale.planning.traffic import GLOO, Pace, ends, sharding_of, update_of
from w2vscale.planning.work import Model

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "lab" / "2026-11-29-slow-links.json"
"""Points measured before."""

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
SPEEDS = (200.0, 600.0)
"""Megabits per second that a host can send."""

PAYLOAD = 1448 / 1514
"""The part of a full Ethernet frame that is not headers of Ethernet, IP and TCP with time stamps."""

LATENCY = 150e-6
"""Seconds of one hop, measured: an all-reduce of one number takes 2 hops in 0.2 to 0.4 ms, and 4 in 0.5 ms."""

LIMIT = 900
"""Seconds after which processes are given up."""


@dataclass(frozen=True)
class Trial:
    """What all points have in common."""

    settings: tuple[str, ...] = ("precision.compute=fp32", "data.max_seconds=8")
    engines: tuple[str, ...] = ENGINES
    speeds: tuple[float, ...] = SPEEDS
    forwards: int = 2
    seconds: float = 8.0  # audio of a forward
    updates: int = 10


@dataclass(frozen=True)
class Point:
    """One engine on `hosts` hosts. Times are medians in seconds: measured, and of the same processes without links."""

    engine: str
    hosts: int
    megabits: float
    seconds: float
    window: float  # alone: forwards and backwards
    step: float  # alone: the optimizer step
    sent: float  # bytes per host and update, with headers


def measure(trial: Trial, *, hosts: Sequence[int] = (1, 2, 3)) -> list[Point]:
    """Run all points.

    Raises:
        UserError: this machine cannot have such hosts, or a process failed.
    """
    if reason := missing_for_hosts():
        raise UserError(f"--validate: {reason}")
    return [point for count in hosts for point in _points(trial, count)]


def _points(trial: Trial, count: int) -> Iterator[Point]:
    """The points of one number of hosts: medians over the updates, of the host that took longest."""
    speeds = trial.speeds if count > 1 else ()
    figures = _run(trial, count, speeds)

    def median(name: str, *keys: str) -> float:
        updates = zip(*(one[name] for one in figures if name in one), strict=True)
        return statistics.median(max(sum(row[key] for key in keys) for row in update) for update in updates)

    for engine in trial.engines:
        alone = f"{engine} 0"
        cost = {"window": median(alone, "window"), "step": median(alone, "step")}
        if count == 1:
            yield Point(engine, 1, 0.0, median(alone, "window", "step"), sent=0.0, **cost)
        for speed in speeds:
            linked = f"{engine} {speed:g}"
            yield Point(engine, count, speed, median(linked, "window", "step"), sent=median(linked, "sent"), **cost)


def _run(trial: Trial, count: int, speeds: Sequence[float]) -> list[dict[str, list[dict[str, float]]]]:
    """Rows of each process by engine and speed; speed 0: the hosts train apart."""
    with tempfile.TemporaryDirectory() as folder, Hosts(count) as hosts:
        results, processes = [], []
        for alone in (True, False) if speeds else (True,):
            for number, host in enumerate(hosts):
                result = Path(folder) / f"{host.name}_{'alone' if alone else 'together'}.json"
                options = [f"--engine={engine}" for engine in trial.engines] + [f"--speed={speed}" for speed in speeds]
                options += [f"--number={number}", f"--count={count}", f"--address={hosts[0].address}"]
                options += [f"--updates={trial.updates}", f"--forwards={trial.forwards}", f"--seconds={trial.seconds}"]
                options += ["--alone"] if alone else []
                command = [sys.executable, "-W", "ignore", "-m", "tools.scaling.point", str(result), *options]
                processes.append(host.start([*command, *trial.settings], output=result.with_suffix(".log"), cwd=ROOT))
                results.append(result)
        _attend(processes, hosts, Path(folder))
        if failed := [result for result in results if not result.exists()]:
            logs = "".join(result.with_suffix(".log").read_text()[-2000:] for result in failed)
            raise UserError(f"{', '.join(result.stem for result in failed)} failed:\n{logs}")
        return [json.loads(result.read_text()) for result in results]


def _attend(processes: Sequence[subprocess.Popen[str]], hosts: Hosts, folder: Path) -> None:
    """Limit links as the processes ask for it, until all have ended, one has failed, or it takes too long."""
    until = time.monotonic() + LIMIT
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        if any(process.poll() for process in processes):
            return
        for asked in folder.glob("*.asked"):
            hosts.limit(float(asked.read_text()))
            asked.unlink()
            asked.with_suffix(".granted").touch()
        time.sleep(0.005)


def predicted(point: Point, trial: Trial, model: Model) -> tuple[float, float]:
    """Seconds of an update, and bytes that each host sends in it."""
    sharding = sharding_of(point.engine, model, point.hosts, per_node=1)
    forward = point.window / trial.forwards / 3
    tasks = update_of(
        model, sharding, forwards=trial.forwards, pace=Pace(forward, 2 * forward, point.step), backend=GLOO
    )
    link = Link(point.megabits * 1e6 / 8 * PAYLOAD, LATENCY)
    cluster = Cluster("hosts of this machine", 1, link, link, flops=0.0, memory=0.0)
    seconds = network(sharding, cluster, "ring", GLOO)
    # A second pass over links without latency gives the bytes.
    plain = Link(1.0, 0.0)
    size = network(sharding, Cluster("bytes", 1, plain, plain, 0.0, 0.0), "ring", GLOO)
    return max(ends(tasks, seconds)), sum(size(task) for task in tasks if task.kind is not None)


def compared(points: Sequence[Point], trial: Trial) -> Iterator[dict[str, Any]]:
    """Measured and predicted, of all points."""
    model = preset_model("tiny", trial.settings)
    for point in points:
        seconds, sent = predicted(point, trial, model)
        yield asdict(point) | {
            "predicted": seconds,
            "error": abs(seconds - point.seconds) / point.seconds,
            "predicted_sent": sent,
        }


def read_record(file: Path = RECORD) -> tuple[list[Point], Trial, str]:
    """The points of a file that `write_record` wrote, what they have in common, and what they were measured on."""
    document = json.loads(file.read_text())
    shared: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document["trial"].items()
    }
    trial = Trial(**shared)
    return [Point(**point) for point in document["points"]], trial, document["machine"]


def write_record(file: Path, points: Sequence[Point], trial: Trial, machine: str) -> None:
    """Keep measured points."""
    document = {"machine": machine, "trial": asdict(trial), "points": [asdict(point) for point in points]}
    file.write_text(json.dumps(document, indent=1) + "\n")
