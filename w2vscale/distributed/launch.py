"""The launcher behind `--nproc-per-node`: runs this command in several processes; if one fails, it stops them all."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from w2vscale.errors import TemporaryError, UserError
from w2vscale.runtime import LAUNCHER, ONE_REQUEST_SECONDS, STOP_SIGNALS, delete_left_sockets

FAILURE_GRACE = 10.0  # seconds that ranks have to exit when another one has failed; they are then killed

FORWARDED = (*STOP_SIGNALS, signal.SIGQUIT)  # signals that the launcher passes on to the ranks


class LostRanks(TemporaryError):
    """The connection to the other ranks broke. Usually one of them has failed, and its error is the one to look at."""


def launched() -> bool:
    """Return whether a launcher (torchrun, DeepSpeed, SLURM, Kubernetes or this module) started this process."""
    return ranked(os.environ) or slurm_tasks(os.environ) > 1


def ranked(environment: Mapping[str, str]) -> bool:
    """Return whether the rank is in RANK, as torchrun, DeepSpeed and Kubernetes' PyTorchJob set it.

    Inside a step of several SLURM tasks it counts only with LOCAL_RANK, because a RANK that all tasks inherit from the
    batch script would be the same for all.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return False
    return "LOCAL_RANK" in environment or slurm_tasks(environment) <= 1


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of the SLURM step that this process is a task of; 1 if it is none."""
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script also has SLURM_NTASKS and SLURM_PROCID, but is one process.
    return number_in(environment, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_PROCID" in environment else 1


def number_in(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return an environment variable as a number. Raises UserError if it is set to something else."""
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {name}={text} is not a number; only a launcher should set it: unset it"
        )
    return int(text)


def local_processes(environment: Mapping[str, str]) -> int | None:
    """Return the number of processes that the launcher started on the machine of rank 0, or None if it does not say."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun and this module; DeepSpeed
        if name in environment:
            return number_in(environment, name, 1)
    # "4(x2),3" is 4 tasks on each of two machines and 3 on another.
    first = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(first[0]) if first else None


def launch(arguments: Sequence[str], processes: int, *, grace: float = FAILURE_GRACE) -> int:
    """Run `python -m w2vscale ARGUMENTS` in `processes` processes and return the exit code.

    If a process fails, the others are stopped, the failed rank is printed, and its exit code is returned (128 + the
    signal number if a signal killed it). Signals to this process are passed on to all ranks, which then have `grace`
    seconds to save and exit. If this process is killed, Linux kills the ranks.
    """
    if processes < 1:
        raise UserError(f"--nproc-per-node {processes}: must be at least 1")
    signals: list[int] = []
    previous = {number: signal.getsignal(number) for number in FORWARDED}
    ranks: list[subprocess.Popen[bytes]] = []
    with socket.socket() as held:
        # Keeping the socket bound reserves the port. Rank 0 can still listen on it: both sockets set SO_REUSEADDR and
        # this one does not listen (socket(7)).
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        try:
            for number, handler in previous.items():
                if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
                    signal.signal(number, lambda received, frame: signals.append(received))
            for rank in range(processes):
                environment = os.environ | _environment(rank, processes, port=held.getsockname()[1])
                command = [sys.executable, "-m", "w2vscale", *arguments]
                # Each rank gets its own session, so that Ctrl-C reaches only this process, and killing a rank also
                # kills its loader processes.
                with _ctrl_c_blocked():
                    ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return _wait(ranks, signals, grace)
        finally:
            for process in ranks:
                if _poll(process) is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    with suppress(subprocess.TimeoutExpired):  # even SIGKILL waits while a disk or device hangs
                        process.wait(1.0)
            for number, handler in previous.items():
                signal.signal(number, handler)
            delete_left_sockets()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block SIGINT in this thread and in processes that the block starts, which unblock it once they can handle it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(rank: int, processes: int, *, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets, and defaults for two that the user may set."""
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    return {
        LAUNCHER: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Hides stack traces of connections to a rank that has ended: the launcher says which one failed.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signals: list[int], grace: float) -> int:
    """Wait until all ranks have exited or the deadline has passed. Return the first failed rank's exit code, or 0."""
    failed: int | None = None
    forwarded: set[int] = set()
    asked = deadline = math.inf
    while True:
        codes = [_poll(process) for process in ranks]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
            if not forwarded:
                for process in ranks:
                    process.send_signal(signal.SIGTERM)  # does nothing if the process has already exited
        if None not in codes or time.monotonic() > deadline:
            break
        while signals:
            number = signals.pop(0)
            for process in ranks:
                process.send_signal(number)
            if failed is None:
                now = time.monotonic()
                if not forwarded:
                    asked, deadline = now, now + grace
                elif now - asked > ONE_REQUEST_SECONDS:  # the user does not want to wait
                    deadline = min(deadline, now + FAILURE_GRACE)
                forwarded.add(number)
        time.sleep(0.1)
    if failed is None:
        late = [f"rank {rank}" for rank, code in enumerate(codes) if code is None]
        if late:
            print(f"error: did not stop in time and had to be killed: {', '.join(late)}", file=sys.stderr)
        return 128 + signal.SIGKILL if late else 0
    code = codes[failed]
    assert code is not None
    if -code not in forwarded and (line := describe_failure(failed, code)):
        print(line, file=sys.stderr)
    return code if code > 0 else 128 - code


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of a rank, or None if it runs. What an ended rank has left in its session is killed."""
    if process.returncode is None and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        os.killpg(process.pid, signal.SIGKILL)  # before `poll`, after which another process may have the number
    return process.poll()


def describe_failure(rank: int, code: int) -> str | None:
    """Return the error line for a failed rank, or None if the rank has printed its own (user errors, stop signals)."""
    if code in (UserError.exit_code, TemporaryError.exit_code) or code > 128:
        return None
    if code > 0:
        return f"error: rank {rank} failed (see above), exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"error: rank {rank} was killed by {signal.Signals(-code).name}{hint}"
