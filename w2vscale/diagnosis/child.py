"""Checks in child processes: a library that crashes or hangs ends its own check and no other.

As a program, `python -m w2vscale.diagnosis.child FUNCTION ARGUMENTS`, this module is such a child. It writes each
finding as a line of JSON as soon as it is made; what libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import IO, Any

from w2vscale.diagnosis.finding import Finding, Verdict
from w2vscale.runtime import end_with_parent, exit_on_signals

CLEANING_UP = 2.0  # seconds that a child has to delete its files when it is stopped


@dataclass(frozen=True)
class Check:
    """A function that yields findings, run in a child process.

    `function`: MODULE:NAME in this package. Only the child imports the module, which may import what is broken.
    `environment`: variables of the child, besides those of this process. `name`, `broken` and `advice`: the finding if
    the function raises, or its process crashes or hangs.
    """

    name: str
    function: str
    advice: str
    broken: Verdict = "fail"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class Children:
    """Runs checks in child processes, some at a time. Those that still run when the `with` block ends are stopped.

    `timeout`: seconds that each may take.
    """

    def __init__(self, timeout: float, *, at_a_time: int) -> None:
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="doctor")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._starting = Lock()  # so that no process starts after `_closed` is set
        self._closed = False

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._starting:
            self._closed = True
        for process in list(self._running):
            _stop(process)

    def start(self, check: Check) -> Future[tuple[list[Finding], bool]]:
        """Start a check. The result: its findings, and whether it was completed. If not, the last one says why."""
        return self._pool.submit(self._run, check)

    def _run(self, check: Check) -> tuple[list[Finding], bool]:
        try:
            findings, problem = self._run_child(check)
        except OSError as error:
            findings, problem = [], f"no process can be started for this check: {error}"
        if problem is not None:
            findings.append(Finding(check.name, check.broken, problem, check.advice))
        return findings, problem is None

    def _run_child(self, check: Check) -> tuple[list[Finding], str | None]:
        """The findings of a child, and why it did not come to its end, or None."""
        # Files in memory: unlike a pipe, they can be read whatever has become of the child, and need no disk.
        with open(os.memfd_create("findings"), "rb") as answers, open(os.memfd_create("errors"), "rb") as errors:
            with self._starting:
                if self._closed:
                    return [], "was not started"
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, check.function, json.dumps(dict(check.arguments))],
                    stdin=subprocess.DEVNULL,
                    stdout=answers,
                    stderr=errors,
                    env=os.environ | dict(check.environment),
                    start_new_session=True,
                )
                self._running.add(process)
            if not (ended := _ends(process, self._timeout)):
                _stop(process)
            self._running.discard(process)
            lines, _, _ = _content(answers).rpartition("\n")  # without one that is incomplete
            findings = [Finding(**json.loads(line)) for line in lines.splitlines()]
            return findings, _problem(process.returncode if ended else None, _content(errors), self._timeout)


def _ends(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether the process ends within the time-out."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    return process.returncode is not None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all that it has started. One that waits for a dead disk stays: even SIGKILL waits for that."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        _ends(process, CLEANING_UP)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _problem(code: int | None, errors: str, timeout: float) -> str | None:
    """Why a child did not end well; None if it did. `code`: its exit code, or None if it had to be stopped."""
    if code == 0:
        return None
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    if code is None:
        return f"does not end within {timeout:g} s"
    if code < 0:
        return f"crashes Python ({signal.Signals(-code).name}){f': {last}' if last else ''}"
    if code == 1 and "Traceback (most recent call last)" in errors:
        return re.sub(r"^w2vscale[\w.]*: ", "", last)  # our own errors say what is wrong
    return f"ends Python with exit code {code}{f': {last}' if last else ''}"


def main() -> None:
    """Run one check and write its findings to stdout."""
    end_with_parent()
    # Libraries print to stdout, some of them in C.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module, _, name = sys.argv[1].partition(":")
    with exit_on_signals():
        check = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        for finding in check(**json.loads(sys.argv[2])):
            print(json.dumps(asdict(finding)), file=answers, flush=True)
    answers.close()
    # A library that hangs or crashes when Python ends has still passed its check.
    os._exit(0)


if __name__ == "__main__":
    main()
