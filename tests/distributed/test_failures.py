"""A rank that raises or is killed ends them all, and it is its error that is seen. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.audio import SmallCorpus
from tests.micro import MICRO_RUN
from w2vscale.distributed import launch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
BOUND = 30.0
"""Seconds within which all ranks have to end, as the project promises."""

RAISE = """
import os

if os.environ.get("RANK") == "1":
    from w2vscale.training.loop import Trainer

    working = Trainer._update

    def failing(self, *arguments):
        return 1 / (2 - self.state.update) and working(self, *arguments)

    Trainer._update = failing
"""
"""Makes rank 1 fail in its third update, as a `sitecustomize`: a module that Python runs before the program."""

LOSE_THE_FILES = """
import os

if os.environ.get("RANK") == "1":
    os.chdir("/")
"""
"""Makes rank 1 alone not find what the command names by a relative path."""

LOOP = "while :; do sleep 0.05; done"
WAIT_FOR = "wait_for() { while [ ! -e $1 ]; do sleep 0.05; done; }; wait_for"


class Launched:
    """A run of two processes that has reached an update, and what its terminal shows."""

    def __init__(self, corpus: Path, folder: Path, *, preset: str = "base", sitecustomize: str = "") -> None:
        self.metrics = folder / "exp" / "metrics.jsonl"
        (folder / "sitecustomize.py").write_text(sitecustomize)
        settings = [*MICRO_RUN, f"data.train={corpus}", "trainer.updates=100000"]
        command = [sys.executable, "-m", "w2vscale", "train", preset, *settings, "--exp", str(folder / "exp")]
        self.process = subprocess.Popen(
            [*command, "--nproc-per-node", "2"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        )

    def wait_for_update(self, update: int) -> None:
        deadline = time.monotonic() + 120.0
        while not (self.metrics.is_file() and self.metrics.read_text().count("\n") >= update):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"update {update} was not reached"
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """The process ids of ranks 0 and 1."""
        found = {}
        for child in self._children():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): child for each in environment if each.startswith(b"RANK=")}
        return [found[0], found[1]]

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once all has ended by itself."""
        _, errors = self.process.communicate(timeout=BOUND)
        return self.process.returncode, errors

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            for process in (*self._children(), self.process.pid):
                os.kill(process, signal.SIGKILL)
            self.process.communicate()

    def _children(self) -> list[int]:
        launcher = self.process.pid
        return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class TestTraining:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_killed_rank_ends_all(self, rank: int, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        with Launched(small_corpus.train, tmp_path) as run:
            run.wait_for_update(2)
            ranks = run.ranks()
            os.kill(ranks[rank], signal.SIGKILL)
            code, errors = run.end()
        assert code == 128 + signal.SIGKILL
        assert errors.splitlines()[-1] == f"error: rank {rank} was killed by SIGKILL (out of memory?)"
        assert "Traceback" not in errors
        assert not any(running(rank) for rank in ranks)

    def test_an_exception_of_one_rank_ends_all_and_is_shown(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        with Launched(small_corpus.train, tmp_path, sitecustomize=RAISE) as run:
            run.wait_for_update(1)
            code, errors = run.end()
        assert code == 1
        lines = errors.splitlines()
        traceback = [line for line in lines if line.startswith("[rank 1]")]
        assert traceback[0] == "[rank 1] Traceback (most recent call last):"
        assert traceback[-1] == "[rank 1] ZeroDivisionError: division by zero"
        assert lines[-1] == "error: rank 1 failed (see above), exit code 1"
        # The first error is not buried under what follows from it.
        assert len(lines) - len(traceback) <= 2

    def test_a_mistake_that_one_rank_meets_is_its_one_line(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("preset: base\n")
        with Launched(small_corpus.train, tmp_path, preset="run.yaml", sitecustomize=LOSE_THE_FILES) as run:
            code, errors = run.end()
        assert code == 2
        assert errors.startswith("error: run.yaml: neither a file nor a preset")
        assert errors.count("\n") == 1


class TestLauncher:
    """The launcher alone: shell scripts take the place of the ranks' Python."""

    @pytest.fixture
    def launch_shells(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str]]:
        def call(*scripts: str) -> tuple[int, str]:
            cases = "".join(f"{rank}) {script};;\n" for rank, script in enumerate(scripts))
            python = tmp_path / "python"
            python.write_text(f"#!/bin/sh\ncd {tmp_path}\ncase $RANK in\n{cases}esac\n")
            python.chmod(0o755)
            monkeypatch.setattr(sys, "executable", str(python))
            code = launch.launch([], len(scripts))
            return code, capfd.readouterr().err

        return call

    def test_a_rank_that_cannot_be_asked_to_end_is_killed(
        self, launch_shells: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(launch, "FAILURE_GRACE", 0.5)
        code, errors = launch_shells(f"trap '' TERM; echo $$ > pid; {LOOP}", f"{WAIT_FOR} pid; kill -SEGV $$")
        assert (code, errors) == (128 + signal.SIGSEGV, "error: rank 1 was killed by SIGSEGV\n")
        assert not running(int((tmp_path / "pid").read_text()))

    def test_the_first_failure_is_the_one_that_is_named(self, launch_shells: Callable[..., tuple[int, str]]) -> None:
        code, errors = launch_shells(f"trap 'exit 3' TERM; touch set; {LOOP}", f"{WAIT_FOR} set; exit 7", "exit 0")
        assert (code, errors) == (7, "error: rank 1 failed (see above), exit code 7\n")

    def test_signals_are_passed_on_once_and_ranks_have_time(
        self, launch_shells: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(launch, "FAILURE_GRACE", 0.1)
        save = "trap 'echo >> asked' USR1 TERM; touch $RANK; {}; sleep 0.5; touch saved$RANK; {}"
        code, errors = launch_shells(
            save.format(f"{WAIT_FOR} 1; kill -USR1 $PPID; {WAIT_FOR} asked", f"{WAIT_FOR} saved1; exit 138"),
            save.format(f"{WAIT_FOR} asked", "exit 0"),
        )
        assert (code, errors) == (128 + signal.SIGUSR1, "")
        assert (tmp_path / "saved0").exists()
        assert (tmp_path / "asked").read_text() == "\n\n"
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
