"""A SLURM of one machine: `sbatch` that runs a batch script, and the programs of tests/helpers/fake_slurm.py for it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.fake_slurm import descendants

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("srun", "scontrol", "scancel")


class Job:
    """A job, which `sbatch` starts when it is made, and starts again with `again`.

    `script` is a batch file, `tasks` the number of tasks on each of its machines. Its output goes to
    `folder`/slurm.out. Machines and tasks are not those of the script's options, but `tasks`.
    """

    def __init__(
        self,
        script: Path,
        *arguments: str,
        folder: Path,
        tasks: Sequence[int] = (1,),
        number: int | None = None,
        **environment: str,
    ) -> None:
        self.folder, self.arguments, self.restarts = folder, arguments, 0
        # Jobs differ in their port, also those of tests that run at the same time.
        self.number = os.getpid() * 10 % 1_000_000 if number is None else number
        self.options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text(), flags=re.MULTILINE))
        (folder / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            program = folder / "bin" / name
            program.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" -S "{ROOT}/tests/helpers/fake_slurm.py" {name} "$@"\n'
            )
            program.chmod(0o755)
        self.spooled = folder / "slurm_script"  # SLURM runs a copy, which cannot find files beside itself
        shutil.copy(script, self.spooled)
        nodes = len(tasks)
        self.environment = {
            "FAKE_SLURM": str(folder),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(self.number),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": "127.0.0.1" if nodes == 1 else f"127.0.0.[1-{nodes}]",
            "SLURM_TASKS_PER_NODE": ",".join(map(str, tasks)),
            "SLURM_NTASKS": str(sum(tasks)),
            # The batch script is task 0 of its own.
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        } | environment
        if len(set(tasks)) == 1:
            self.environment["SLURM_NTASKS_PER_NODE"] = str(tasks[0])
        self.again()

    def again(self) -> None:
        """Start it, as SLURM does for a job that was put back."""
        restarts = {"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}
        self.restarts += 1
        with (self.folder / "slurm.out").open("ab" if self.options.get("open-mode") == "append" else "wb") as output:
            self.process = subprocess.Popen(
                ["bash", str(self.spooled), *self.arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment | restarts,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.folder / "slurm.out").read_text()

    @property
    def requeued(self) -> int:
        """How often it was put back into the queue."""
        file = self.folder / "requeued"
        return file.read_text().split().count(str(self.number)) if file.exists() else 0

    @property
    def steps(self) -> list[str]:
        """The command lines of srun."""
        return (self.folder / "steps.log").read_text().splitlines()

    def warn(self) -> None:
        """The signal of --signal=B:USR1@120, to the batch script."""
        assert self.options["signal"] == "B:USR1@120"
        self.process.send_signal(signal.SIGUSR1)

    def wait_for(self, file: Path, lines: int, *, seconds: float = 180.0) -> None:
        """Wait until a file has that many lines."""
        deadline = time.monotonic() + seconds
        while not (file.is_file() and file.read_text().count("\n") >= lines):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def finish(self, *, code: int | tuple[int, ...], seconds: float = 240.0) -> str:
        """Wait until the batch script ends with `code`, or one of several; returns what the job has printed."""
        try:
            found = self.process.wait(seconds)
        finally:
            self.close()
        assert found in (code if isinstance(code, tuple) else (code,)), self.output
        return self.output

    def close(self) -> None:
        """Kill what is left of it."""
        for process in [*descendants(self.process.pid), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait(10)
