"""The real command line in real processes, as a terminal starts it: a launcher and two ranks, or one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import running

ROOT = Path(__file__).resolve().parents[2]
BOUND = 60.0
"""Seconds within which all ranks have to end, also on a busy machine."""

HOLD = """
import os
import time
from pathlib import Path

if "RANK" in os.environ and "HOLD" in os.environ:
    from w2vscale.training.loop import Trainer

    working = Trainer._update

    def held(self, *arguments):
        if self.state.update == int(os.environ["HOLD"]):
            Path(f"held-{os.environ['RANK']}").touch()
            time.sleep(600)
        return working(self, *arguments)

    Trainer._update = held
"""
"""Makes all ranks wait once they have begun to save after update $HOLD, as a `sitecustomize`: a module that Python runs
before the program."""


class Launched:
    """A run in `folder`/exp, endless unless the settings say otherwise, and what its terminal shows.

    `hold`: with HOLD, the update after which its ranks wait. Temporary files go to `temporary`,
    which has a short path, as sockets need.
    """

    def __init__(
        self,
        corpus: Path,
        folder: Path,
        *,
        preset: str = "base",
        settings: Sequence[str] = ("trainer.updates=100000",),
        sitecustomize: str = "",
        hold: int | None = None,
        processes: int = 2,
    ) -> None:
        self.folder = folder
        self.metrics = folder / "exp" / "metrics.jsonl"
        (folder / "sitecustomize.py").write_text(sitecustomize)
        settings = [*MICRO_RUN, f"data.train={corpus}", *settings]
        held = {} if hold is None else {"HOLD": str(hold)}
        command = [sys.executable, "-m", "w2vscale", "train", preset, *settings, "--exp", str(folder / "exp")]
        self.temporary = Path(tempfile.gettempdir()) / f"t-{zlib.crc32(str(folder).encode()):x}"
        self.temporary.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*command, "--nproc-per-node", str(processes)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | held
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
                "TMPDIR": str(self.temporary),
                "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # PyTorch makes it in TMPDIR otherwise
            },
        )

    def wait_for_update(self, update: int) -> None:
        deadline = time.monotonic() + 120.0
        while not (self.metrics.is_file() and self.metrics.read_text().count("\n") >= update):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"update {update} was not reached"
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """The process ids of ranks 0 and 1."""
        found: dict[int, int] = {}
        for child in self._children():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): child for each in environment if each.startswith(b"RANK=")}
        return [found[0], found[1]]

    def processes(self) -> list[int]:
        """The process ids of the launcher, its ranks and their loaders, or those of a single process."""
        found = [self.process.pid]
        for process in found:
            found += children(process)
        return found

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once all has ended by itself."""
        _, errors = self.process.communicate(timeout=BOUND)
        return self.process.returncode, errors

    def finish(self, timeout: float) -> str:
        """What it printed, once it has ended with success."""
        printed, errors = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, (printed, errors)
        return printed + errors

    def kill_once_held(self, *, committed: Path | None) -> str:
        """SIGKILL ranks and launcher as soon as all ranks wait and the checkpoint is there; what they had printed."""
        awaited = [self.folder / f"held-{rank}" for rank in range(2)] + ([committed] if committed else [])
        deadline = time.monotonic() + 120.0
        while not all(path.exists() for path in awaited):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"none of {[str(path) for path in awaited if not path.exists()]}"
            time.sleep(0.02)
        processes = [*self._children(), self.process.pid]
        for process in processes:
            os.kill(process, signal.SIGKILL)
        printed, errors = self.process.communicate()
        while any(map(running, processes)):
            time.sleep(0.02)
        for path in awaited[:2]:
            path.unlink()
        return printed + errors

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            # After the death of a loader, PyTorch opens ten empty files to see whether it can. An exit may leave some.
            for file in self.temporary.glob("tmp????????"):
                if file.is_file() and not file.stat().st_size:
                    file.unlink()
            self.temporary.rmdir()  # if nothing is left in it
        with self.process:  # closes its pipes
            if self.process.poll() is None:
                for process in (*self._children(), self.process.pid):
                    os.kill(process, signal.SIGKILL)
                self.process.communicate()

    def _children(self) -> list[int]:
        return children(self.process.pid)


def children(process: int) -> list[int]:
    """The process ids of what a process has started."""
    found = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def wait_until_gone(processes: Sequence[int], *, seconds: float = 10.0) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if running(process)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)
