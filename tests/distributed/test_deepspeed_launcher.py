"""`deepspeed --module w2vscale …`: DeepSpeed's own launcher starts the processes, which it gives `--local_rank`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.fake_slurm import descendants
from tests.helpers.launched import wait_until_gone
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.verification import verify

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.distributed, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]


class Deepspeed:
    """DeepSpeed's launcher with two processes, and what it prints."""

    def __init__(self, *arguments: object, folder: Path) -> None:
        self.output = folder / "printed"
        # As cmd.sh starts it. Tests that run at the same time need different ports.
        options = ("--num_gpus", "2", "--master_port", str(20_000 + os.getpid() % 12_000), "--module")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("deepspeed"), *options, "w2vscale", *map(str, arguments)],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

    def finish(self, *, code: int, seconds: float = 120.0) -> str:
        found = self.process.wait(seconds)
        assert found == code, self.output.read_text()
        return self.output.read_text()

    def __enter__(self) -> Deepspeed:
        return self

    def __exit__(self, *error: object) -> None:
        for process in [*descendants(self.process.pid), self.process.pid] if self.process.poll() is None else ():
            os.kill(process, signal.SIGKILL)
        self.process.wait(10)


def test_it_trains_and_evaluates(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    settings = (*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=2", "schedule.warmup_updates=1")
    zero = ("engine.name=deepspeed", "engine.deepspeed_config=zero2")
    with Deepspeed("train", "base", *settings, *zero, "--exp", "exp", folder=tmp_path) as run:
        assert "on 2 ranks" in run.finish(code=0)
    last = (tmp_path / "exp" / "run.sh").read_text().splitlines()[-1]
    # The script starts the processes itself, without what DeepSpeed's launcher has added.
    assert shlex.split(last)[-3:] == ["--nproc-per-node", "2", "$@"] and "local_rank" not in last

    with Deepspeed("evaluate", "exp", "--cuts", small_corpus.validation, "--debug", folder=tmp_path) as run:
        assert "accuracy" in run.finish(code=0)


def test_a_wrong_setting_is_code_2(tmp_path: Path) -> None:
    with Deepspeed("train", "base", "optim.lr=fast", folder=tmp_path) as run:
        assert "error: override: optim.lr='fast'" in run.finish(code=2)


class TestInterruption:
    @pytest.fixture
    def run(self, small_corpus: SmallCorpus, tmp_path: Path) -> Iterator[Deepspeed]:
        """An endless run after its third update."""
        settings = (*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=100000", "data.workers=1")
        metrics = tmp_path / "exp" / "metrics.jsonl"
        with Deepspeed("train", "base", *settings, "--exp", "exp", folder=tmp_path) as run:
            deadline = time.monotonic() + 120.0
            while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
                assert run.process.poll() is None and time.monotonic() < deadline, run.output.read_text()
                time.sleep(0.05)
            yield run

    def test_sigterm_to_the_process_that_starts_the_ranks_saves(self, run: Deepspeed, tmp_path: Path) -> None:
        """As by Ctrl-C, which reaches it, too. Its exit code is 1 whatever the ranks' is."""
        everything = descendants(run.process.pid)
        os.kill(everything[0], signal.SIGTERM)
        assert "stopped by SIGTERM; the same command continues from here" in run.finish(code=1)
        wait_until_gone(everything)
        assert verify(tmp_path / "exp").problems == []
        assert not (tmp_path / "exp" / "lock").exists()

    def test_a_stop_signal_to_a_rank_saves_on_all_and_keeps_its_code(self, run: Deepspeed, tmp_path: Path) -> None:
        everything = descendants(run.process.pid)
        ranks = [each for each in everything if b"--local_rank" in Path(f"/proc/{each}/cmdline").read_bytes()]
        os.kill(ranks[0], signal.SIGUSR1)
        printed = run.finish(code=138)
        assert "stopped by SIGUSR1; the same command continues from here" in printed
        wait_until_gone(everything)
        assert verify(tmp_path / "exp").problems == []

    def test_the_ranks_end_with_the_process_that_started_them(self, run: Deepspeed) -> None:
        everything = descendants(run.process.pid)
        os.kill(everything[0], signal.SIGKILL)
        wait_until_gone(everything, seconds=20.0)
