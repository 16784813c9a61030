"""SLURM's srun, scontrol and scancel on one machine: `fake_slurm.py PROGRAM [ARGUMENT…]`.

It does what their manuals say of the options that this project uses, and refuses all others. The machines of a job are
addresses of this one, such as 127.0.0.[1-2]. Files in $FAKE_SLURM: `steps/PID` for each running srun, `requeued` with
the jobs that were put back, and `steps.log` with the command lines of srun.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

KILL_WAIT = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def state() -> Path:
    """The folder of the job."""
    return Path(os.environ["FAKE_SLURM"])


def expand(nodes: str) -> list[str]:
    """The names in a list of nodes such as node[1-2,4]."""
    matched = re.fullmatch(r"(.*)\[(.*)\]", nodes)
    if not matched:
        return nodes.split(",")
    names = []
    for part in matched[2].split(","):
        first, _, last = part.partition("-")
        names += [f"{matched[1]}{number}" for number in range(int(first), int(last or first) + 1)]
    return names


def tasks_per_node(text: str) -> list[int]:
    """2(x2),1 is two tasks on each of two nodes, and one on another."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def descendants(process: int) -> list[int]:
    """All that a process has started, and what these have started."""
    found = []
    for thread in Path(f"/proc/{process}/task").glob("*"):
        try:
            children = [int(child) for child in (thread / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def send(number: int, process: int) -> None:
    """Signal everything that runs in a step, as slurmstepd does."""
    for descendant in descendants(process):
        try:
            os.kill(descendant, number)
        except ProcessLookupError:
            continue


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(expand(arguments[2])))
    elif arguments[0] == "requeue":
        with (state() / "requeued").open("a") as file:
            file.write(f"{arguments[1]}\n")
    else:
        return 1
    return 0


def scancel(arguments: list[str]) -> int:
    parser = ArgumentParser()
    parser.add_argument("--signal", required=True)
    parser.add_argument("job")
    given = parser.parse_args(arguments)
    for step in (state() / "steps").iterdir():
        send(signal.Signals[f"SIG{given.signal}"], int(step.name))
    return 0


def srun(arguments: list[str]) -> int:
    parser = ArgumentParser()
    for option in ("--kill-on-bad-exit", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task"):
        parser.add_argument(option, type=int)
    parser.add_argument("command", nargs="...")
    given = parser.parse_args(arguments)
    nodes = expand(os.environ["SLURM_JOB_NODELIST"])[: given.nodes]
    counts = tasks_per_node(os.environ["SLURM_TASKS_PER_NODE"])
    if given.ntasks_per_node:
        counts = [given.ntasks_per_node] * len(nodes)
    counts = counts[: len(nodes)]
    assert given.ntasks in (None, sum(counts))
    step = len((state() / "steps.log").read_text().splitlines()) if (state() / "steps.log").exists() else 0
    with (state() / "steps.log").open("a") as file:
        file.write(" ".join(arguments) + "\n")
    common = {
        "SLURM_STEP_ID": str(step),
        "SLURM_STEPID": str(step),
        "SLURM_STEP_NUM_NODES": str(len(nodes)),
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)),
        "SLURM_NTASKS": str(sum(counts)),
        "SLURM_NPROCS": str(sum(counts)),
    }
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CPUS_PER_TASK"} | common
    if given.cpus_per_task:
        environment["SLURM_CPUS_PER_TASK"] = str(given.cpus_per_task)
    tasks = []
    for node, count in enumerate(counts):
        for local in range(count):
            own = {
                "SLURM_PROCID": str(len(tasks)),
                "SLURM_LOCALID": str(local),
                "SLURM_NODEID": str(node),
                "SLURMD_NODENAME": nodes[node],
                # Of its own cgroup, each task sees its GPU as number 0.
                "CUDA_VISIBLE_DEVICES": "0" if os.environ.get("FAKE_SLURM_GPUS") == "one" else "",
            }
            tasks.append(subprocess.Popen(given.command, env=environment | own, start_new_session=True))
    return wait(tasks, kill_on_bad_exit=bool(given.kill_on_bad_exit))


def wait(tasks: list[subprocess.Popen[bytes]], *, kill_on_bad_exit: bool) -> int:
    """Pass signals on to the tasks until all have ended; the highest exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: send(received, os.getpid()))
    (state() / "steps").mkdir(exist_ok=True)
    mark = state() / "steps" / str(os.getpid())
    mark.touch()
    told: set[int] = set()
    kill_at = float("inf")
    while any(task.poll() is None for task in tasks):
        for number, task in enumerate(tasks):
            if task.poll() and number not in told:
                told.add(number)
                how = f"Exited with exit code {task.returncode}" if task.returncode > 0 else "Terminated"
                print(f"srun: error: task {number}: {how}", file=sys.stderr)
                if kill_on_bad_exit and kill_at == float("inf"):
                    kill_at = time.monotonic() + KILL_WAIT
                    send(signal.SIGTERM, os.getpid())
        if time.monotonic() > kill_at:
            send(signal.SIGKILL, os.getpid())
        time.sleep(0.05)
    mark.unlink()
    return max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks))


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](sys.argv[2:]))
