"""A command in this process on input that may be damaged: how it ended, what it printed, wrote and started."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

from w2vscale.cli.app import main

SECONDS = 30.0  # for one command; the machine is shared
EVENTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect"}

_started: list[str] | None = None


class Left(BaseException):
    """Replaces `os._exit`."""


class Hung(BaseException):
    """A command did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    printed: str
    errors: str
    new_files: list[str]  # relative to the current folder

    @property
    def refused(self) -> bool:
        """Whether it ended with one line, or as the command-line parser reports wrong arguments."""
        one_line = self.errors.startswith("error: ") and self.errors.count("\n") == 1
        usage = (self.errors or self.printed).lstrip().startswith(("Usage: ", "╭─ Error"))
        return self.code == 2 and (one_line or usage)


def run(*arguments: object) -> Outcome:
    """Run `w2vscale ARGUMENTS` as its own program would; an unexpected error is raised.

    Asserts that it ended with exit code 0, or was refused, and that no program was started.
    """
    before = set(files_below(Path.cwd()))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    err.reconfigure(errors="backslashreplace")  # as Python does
    argv = ["w2vscale", *map(str, arguments)]
    code: object = 0
    here, exit_process = os.getpid(), os._exit

    def leave(status: int) -> None:
        if os.getpid() != here:  # a forked worker
            exit_process(status)
        raise Left(status)

    patched = mock.patch.object(sys, "argv", argv), mock.patch.object(os, "_exit", leave)
    with patched[0], patched[1], no_programs(), in_time(), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except Left as left:
            code = left.args[0]
        except SystemExit as left:
            code = left.code or 0
    printed, errors = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    new = sorted(set(files_below(Path.cwd())) - before)
    outcome = Outcome(int(str(code)), printed, errors, new)
    assert outcome.code == 0 or outcome.refused, outcome
    assert "Traceback" not in printed + errors, outcome
    return outcome


def files_below(folder: Path) -> list[str]:
    """All paths below a folder, relative to it."""
    return [
        os.path.relpath(os.path.join(here, name), folder)
        for here, folders, files in os.walk(folder)
        for name in [*folders, *files]
    ]


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hung if the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(f"took more than {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def no_programs() -> Iterator[None]:
    """Assert that the block starts no program and opens no connection. Forks, as of workers, are none."""
    global _started
    if _started is None:
        sys.addaudithook(_record)
    _started = []
    yield
    assert not _started, _started


def _record(event: str, arguments: object) -> None:
    if event in EVENTS and _started is not None:
        _started.append(f"{event} {arguments!r:.300}")
