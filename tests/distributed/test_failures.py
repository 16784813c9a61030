"""A rank that raises or is killed ends them all, and it is its error that is seen. Real processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.launched import Launched
from tests.helpers.processes import running
from w2vscale.distributed import launch

pytestmark = pytest.mark.distributed

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


class TestTraining:
    @pytest.mark.long
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

    @pytest.mark.long
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

    @pytest.mark.long
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

    def test_two_signals_at_once_are_one_request(
        self, launch_shells: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A scheduler or a closed terminal sends several, and they arrive in any order."""
        monkeypatch.setattr(launch, "FAILURE_GRACE", 0.1)
        trap = "trap ':' TERM HUP; touch $RANK"
        save = f"{trap}; {WAIT_FOR} 1; kill -HUP $PPID; kill -TERM $PPID; touch sent; sleep 1; exit 129"
        assert launch_shells(save, f"{trap}; {WAIT_FOR} sent; exit 0") == (128 + signal.SIGHUP, "")

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
