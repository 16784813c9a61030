"""`--nproc-per-node`: start this same command once per process on this machine; when one fails, end all."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from w2vscale.errors import UserError

FAILURE_GRACE = 10.0
"""Seconds that the other ranks have to end once one has failed."""

STOP_GRACE = 600.0
"""Seconds that the ranks have to save and leave once the launcher was told to stop."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
"""Those that ask a run to stop, and the one that asks for a dump."""


class LostRanks(RuntimeError):
    """The connection to the other ranks broke: mostly because one of them has ended, which is the error to see."""


def launched() -> bool:
    """Whether a launcher (torchrun, SLURM, or this module) already started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m w2vscale ARGUMENTS` in `processes` processes; returns the exit code.

    A process that fails ends the others, is named, and its exit code is returned (128 + the signal that killed it).
    A signal to this process is passed on to all, which then have time to save.

    Raises:
        UserError: the number of processes cannot be.
    """
    if processes < 1:
        raise UserError(f"--nproc-per-node {processes}: must be at least 1")
    signals: list[int] = []
    previous = {number: signal.getsignal(number) for number in FORWARDED}
    ranks: list[subprocess.Popen[bytes]] = []
    with socket.socket() as held:
        # Bound, so that nobody else is given the port; rank 0 can listen on it because nobody does yet (socket(7)).
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        try:
            for number, handler in previous.items():
                if handler is not signal.SIG_IGN:  # as under nohup
                    signal.signal(number, lambda received, frame: signals.append(received))
            for rank in range(processes):
                environment = os.environ | _environment(rank, processes, port=held.getsockname()[1])
                command = [sys.executable, "-m", "w2vscale", *arguments]
                # A session each: Ctrl-C reaches this process alone, and a rank's loaders can be killed with it.
                ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return _wait(ranks, signals)
        finally:
            for process in ranks:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    with suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk or device
                        process.wait(1.0)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _environment(rank: int, processes: int, *, port: int) -> dict[str, str]:
    """What torchrun sets, and defaults for what the user did not."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Silences DDP's advice on LayerDrop's unused parameters, per rank.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signals: list[int]) -> int:
    """Wait for all ranks, or until their time is up. Returns the exit code of the first that failed, or 0."""
    failed: int | None = None
    asked: set[int] = set()
    deadline = math.inf
    while True:
        codes = [process.poll() for process in ranks]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
            if not asked:
                _send(signal.SIGTERM, ranks)
        if None not in codes or time.monotonic() > deadline:
            break
        while signals:
            number = signals.pop(0)
            _send(number, ranks)
            if failed is None:
                # Asked twice, it is urgent.
                deadline = time.monotonic() + (FAILURE_GRACE if asked else STOP_GRACE)
                asked.add(number)
        time.sleep(0.1)
    if failed is None:
        late = [f"rank {rank}" for rank, code in enumerate(codes) if code is None]
        if late:
            print(f"error: did not stop in time and had to be killed: {', '.join(late)}", file=sys.stderr)
        return 128 + signal.SIGKILL if late else 0
    code = codes[failed]
    assert code is not None
    if -code not in asked and (line := _failure(failed, code)):
        print(line, file=sys.stderr)
    return code if code > 0 else 128 - code


def _send(number: int, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.send_signal(number)  # does nothing once a process has ended


def _failure(rank: int, code: int) -> str | None:
    """What is to be said of a rank's exit code; nothing where the rank has said it: a user's error, a stop."""
    if code == 2 or code > 128:
        return None
    if code > 0:
        return f"error: rank {rank} failed (see above), exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"error: rank {rank} was killed by {signal.Signals(-code).name}{hint}"
