"""A stop signal in each phase of a run: a valid checkpoint within the grace time, the documented code, nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.launched import Launched, wait_until_gone
from w2vscale.checkpoint.format import committed, update_of
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.verification import verify

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(300)]

GRACE = 15.0  # seconds

SLOW = """
import os
import time
from pathlib import Path

def slowed(function, phase, seconds):
    def slow(*arguments, **settings):
        training = settings.get("training", phase != "validation")
        if os.environ.get("SLOW") == phase and training == (phase != "validation"):
            Path(f"in-{phase}").touch()
            time.sleep(seconds)
        return function(*arguments, **settings)
    return slow

if "SLOW" in os.environ and ("RANK" in os.environ or os.environ["PROCESSES"] == "1"):
    from w2vscale.checkpoint import store
    from w2vscale.data import loading
    from w2vscale.objectives.contrastive import Contrastive
    from w2vscale.training import train

    train.build_run = slowed(train.build_run, "start-up", 2.0)
    loading._prepare_loader_process = slowed(loading._prepare_loader_process, "loader start", 600.0)
    Contrastive.forward = slowed(slowed(Contrastive.forward, "update", 3.0), "validation", 1.0)
    store.write_tensors = slowed(store.write_tensors, "save", 2.0)
"""
"""Makes a phase slow, and notes that it has begun, as a `sitecustomize`: a module that Python runs before the program.

An update has four forwards of three seconds, and the grace time is shorter than two updates.
"""


@pytest.fixture(scope="module")
def begun(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of update 2."""
    folder = tmp_path_factory.mktemp("begun")
    settings = ("trainer.updates=2", "schedule.warmup_updates=2", "data.workers=1")
    with Launched(small_corpus.train, folder, settings=settings, processes=1) as run:
        run.finish(120.0)
    return folder / "exp"


PHASES = ("start-up", "loader start", "update", "validation", "save")
TRIES = [(phase, 2, signal.SIGTERM) for phase in PHASES]
TRIES += [("update", 1, signal.SIGINT), ("update", 2, signal.SIGUSR1)]


@pytest.mark.parametrize(("phase", "processes", "number"), TRIES)
def test_stops_in_time(
    small_corpus: SmallCorpus,
    tmp_path: Path,
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    processes: int,
    number: signal.Signals,
) -> None:
    shutil.copytree(begun, tmp_path / "exp", symlinks=True)
    monkeypatch.setenv("SLOW", phase)
    monkeypatch.setenv("PROCESSES", str(processes))
    settings = (
        "trainer.updates=100000", "schedule.warmup_updates=2", "data.workers=1", "trainer.validate_every=3",
        f"data.validation={small_corpus.validation}", "checkpoint.every=4", f"checkpoint.grace_seconds={GRACE:g}",
    )  # fmt: skip
    with Launched(small_corpus.train, tmp_path, settings=settings, sitecustomize=SLOW, processes=processes) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / f"in-{phase}").exists():
            assert run.process.poll() is None, run.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        everything = run.processes()
        began = time.monotonic()
        os.kill(run.process.pid, number)
        code, errors = run.end()
        seconds = time.monotonic() - began
        assert code == 128 + number, errors
        assert "Traceback" not in errors and "could not stop" not in errors
        assert seconds < GRACE + 5  # for a busy machine
        wait_until_gone(everything)
    assert not run.temporary.exists()
    exp = tmp_path / "exp"
    assert not (exp / "lock").exists()
    assert not [*exp.rglob(".*.partial")]
    assert verify(exp).problems == []
    newest = update_of(committed(exp / "checkpoints")[-1])
    assert newest == {"start-up": 2, "loader start": 2, "update": 2, "validation": 3}.get(phase, newest)
    assert newest >= 4 or phase != "save"


def test_a_signal_to_one_rank_saves_on_all(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """As when one machine of several is taken away."""
    settings = ("trainer.updates=100000", "data.workers=1", "checkpoint.every=100000", "logging.every=1")
    with Launched(small_corpus.train, tmp_path, settings=settings) as run:
        run.wait_for_update(4)
        everything = run.processes()
        os.kill(run.ranks()[1], signal.SIGTERM)
        code, errors = run.end()
        assert code == 128 + signal.SIGTERM, errors
        assert "Traceback" not in errors
        wait_until_gone(everything)
    assert verify(tmp_path / "exp").problems == []
    assert open_checkpoint(tmp_path / "exp").state.update >= 4
