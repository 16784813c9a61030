"""Processes of tests. Importing torch takes seconds: most are forked from one that has done it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

Started = Callable[[], list[BaseProcess]]
"""The processes that a test itself has started and that still run."""

FORKS = multiprocessing.get_context("forkserver")
"""Each process of pytest-xdist has one server, which starts with the first process."""
FORKS.set_forkserver_preload(["tests.distributed.tasks", "w2vscale.cli.app", "w2vscale.cli.train", "deepspeed"])


class Command:
    """`w2vscale ARGUMENTS` at work; what it says goes to a file."""

    def __init__(self, output: Path, *arguments: str) -> None:
        self.output = output
        self.process = FORKS.Process(target=_run, args=(str(output), arguments))
        self.process.start()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def finish(self, *, code: int, timeout: float) -> str:
        """Wait until it has ended with `code` (minus a signal that killed it); what it said."""
        self.process.join(timeout)
        said = self.output.read_text()
        assert self.process.exitcode == code, f"{self.process.exitcode}\n{said}"
        return said


def fork_children() -> None:
    """Have this process start its own as a trainer does: forked from itself, so that they end when it is killed."""
    multiprocessing.set_start_method("fork", force=True)


def _run(output: str, arguments: tuple[str, ...]) -> None:
    fork_children()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["w2vscale", *arguments]
    from w2vscale.cli.app import main

    main()
