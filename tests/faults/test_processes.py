"""Processes that are killed, stopped or signalled from outside: the run ends, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.launched import Launched, wait_until_gone
from tests.helpers.processes import running
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.verification import verify
from w2vscale.errors import TemporaryError, UserError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SLOW_WRITE = """
import os
import time
from pathlib import Path

if "RANK" in os.environ:
    from w2vscale.checkpoint.sharded_writer import _Writer

    working = _Writer.write_data

    def slow(*arguments):
        if os.environ["RANK"] == "1":
            Path("writing").touch()
            time.sleep(5.0)
        return working(*arguments)

    _Writer.write_data = slow
"""
"""Makes rank 1 slow to write a checkpoint, as a `sitecustomize`: a module that Python runs before the program."""

SLOW_FORWARD = """
import os
import time

if "RANK" in os.environ:
    from w2vscale.objectives.contrastive import Contrastive

    working = Contrastive.forward

    def slow(*arguments, **settings):
        time.sleep(2.0)
        return working(*arguments, **settings)

    Contrastive.forward = slow
"""
"""Makes an update of two forwards on each rank take more than four seconds."""

LOADER_ENDED = "error: a loader process was killed or died"

ENDLESS = ("trainer.updates=100000", "checkpoint.every=2", "data.workers=1")


def watched(seconds: float) -> tuple[str, ...]:
    return (*ENDLESS, f"watchdog.seconds={seconds:g}")


def loaders(run: Launched, rank: int) -> list[int]:
    """The loader processes of a rank."""
    found = [run.ranks()[rank]]
    return [process for process in run.processes() if parent(process) == found[0]]


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


class TestKilled:
    @pytest.mark.long
    def test_ranks_and_loaders_end_with_their_launcher(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        with Launched(small_corpus.train, tmp_path, settings=ENDLESS) as run:
            run.wait_for_update(4)
            processes = run.processes()
            assert len(processes) == 5  # a launcher, two ranks, two loaders
            run.process.kill()
            run.process.wait()
            wait_until_gone(processes)
        # The same command continues the run at once, and deletes what was left.
        with Launched(small_corpus.train, tmp_path, settings=(*ENDLESS, "trainer.updates=8")) as run:
            assert "resumed from" in run.finish(120.0)
        assert not run.temporary.exists()

    @pytest.mark.long
    def test_loaders_end_with_their_rank(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        with Launched(small_corpus.train, tmp_path, settings=ENDLESS) as run:
            run.wait_for_update(6)
            orphans = loaders(run, 1)
            assert len(orphans) == 1
            os.kill(run.ranks()[1], signal.SIGKILL)
            wait_until_gone(orphans, seconds=1.0)
            assert run.end()[0] == 128 + signal.SIGKILL
        assert not run.temporary.exists()

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("number", "processes", "expected", "line"),
        [
            (signal.SIGKILL, 1, TemporaryError.exit_code, f"{LOADER_ENDED} (Killed), often"),
            (signal.SIGKILL, 2, TemporaryError.exit_code, LOADER_ENDED),
            # So a process ends that writes to a full /dev/shm.
            (signal.SIGBUS, 1, UserError.exit_code, "error: a loader process found no space in /dev/shm"),
        ],
    )
    def test_a_killed_loader_is_one_line(
        self,
        small_corpus: SmallCorpus,
        tmp_path: Path,
        number: signal.Signals,
        processes: int,
        expected: int,
        line: str,
    ) -> None:
        with Launched(small_corpus.train, tmp_path, settings=ENDLESS, processes=processes) as run:
            run.wait_for_update(6)
            loader = run.processes()[-1]
            os.kill(loader, number)
            code, errors = run.end()
        assert code == expected, errors
        assert line in errors
        assert "Traceback" not in errors
        assert not run.temporary.exists()

    @pytest.mark.long
    def test_a_loader_that_is_killed_during_a_save_is_one_line(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        settings = (*ENDLESS, "checkpoint.asynchronous=false")
        with Launched(small_corpus.train, tmp_path, settings=settings, sitecustomize=SLOW_WRITE) as run:
            deadline = time.monotonic() + 60
            while not (tmp_path / "writing").exists():
                assert run.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            (loader,) = loaders(run, 1)
            os.kill(loader, signal.SIGKILL)
            code, errors = run.end()
        assert code == TemporaryError.exit_code, errors
        assert LOADER_ENDED in errors
        assert "Traceback" not in errors


class TestLock:
    @pytest.mark.long
    def test_a_second_run_is_refused_and_the_first_untouched(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        with Launched(small_corpus.train, tmp_path, settings=ENDLESS, processes=1) as run:
            run.wait_for_update(6)
            before = run.metrics.read_text()
            command = [sys.executable, "-m", "w2vscale", "train", "base", "--exp", str(tmp_path / "exp")]
            began = time.monotonic()
            for arguments in (command, [*command, "--nproc-per-node", "2"]):
                refused = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
                assert (refused.returncode, refused.stdout) == (2, "")
                assert refused.stderr.startswith(f"error: {tmp_path}/exp: in use by process {run.process.pid} on ")
                assert refused.stderr.count("\n") == 1
            assert time.monotonic() - began < 20  # it takes less than a second on a quiet machine
            assert run.metrics.read_text().startswith(before)
            run.wait_for_update(before.count("\n") + 2)
            run.process.kill()
            run.process.wait()
        with Launched(small_corpus.train, tmp_path, settings=(*ENDLESS, "trainer.updates=12"), processes=1) as run:
            assert run.finish(120.0)
        assert not (tmp_path / "exp" / "lock").exists()


@pytest.mark.long
class TestWatchdog:
    def test_long_updates_are_no_hang(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        settings = ("trainer.updates=3", "watchdog.seconds=3", "schedule.warmup_updates=2")
        with Launched(small_corpus.train, tmp_path, settings=settings, sitecustomize=SLOW_FORWARD) as run:
            assert "watchdog" not in run.finish(120.0)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_stopped_rank_is_named_and_ends_the_run(
        self, small_corpus: SmallCorpus, tmp_path: Path, rank: int
    ) -> None:
        with Launched(small_corpus.train, tmp_path, settings=watched(4)) as run:
            run.wait_for_update(6)
            processes = run.processes()
            os.kill(run.ranks()[rank], signal.SIGSTOP)
            code, errors = run.end()
        assert code == TemporaryError.exit_code, errors
        expected = "rank 1: not heard of for" if rank else "rank 0 has not been heard of for"
        assert f"error: watchdog: {'no progress: ' * rank}{expected}" in errors
        assert "no checkpoint is written; the same command continues from the newest one" in errors
        assert errors.count("watchdog:") == 1 and "Traceback" not in errors
        stacks = (tmp_path / "exp" / "logs" / f"stacks_rank_{1 - rank}.txt").read_text()
        assert "w2vscale/training/loop.py" in stacks
        wait_until_gone(processes)
        assert verify(tmp_path / "exp").problems == []

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_stopped_loader_is_named(self, small_corpus: SmallCorpus, tmp_path: Path, processes: int) -> None:
        with Launched(small_corpus.train, tmp_path, settings=watched(4), processes=processes) as run:
            run.wait_for_update(6)
            everything = run.processes()
            loader = loaders(run, 1)[0] if processes == 2 else everything[-1]
            os.kill(loader, signal.SIGSTOP)
            code, errors = run.end()
        assert code == TemporaryError.exit_code, errors
        assert "waiting for data" in errors
        assert f"its child process {loader} is stopped (SIGSTOP)" in errors
        wait_until_gone(everything)

    def test_a_launcher_ends_in_time_though_a_rank_is_stopped(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        settings = (*ENDLESS, "checkpoint.grace_seconds=5")
        with Launched(small_corpus.train, tmp_path, settings=settings) as run:
            run.wait_for_update(6)
            processes = run.processes()
            os.kill(run.ranks()[1], signal.SIGSTOP)
            time.sleep(1.0)
            began = time.monotonic()
            run.process.terminate()
            code, errors = run.end()
        assert time.monotonic() - began < 30  # grace time, and a margin for a busy machine
        assert code == 128 + signal.SIGTERM
        assert "rank 0 could not stop within checkpoint.grace_seconds=5 after SIGTERM" in errors
        assert not any(map(running, processes))
        assert open_checkpoint(tmp_path / "exp").state.update >= 2
