"""What a run delivers to a tracking service, through the training loop: after a signal, and when it has ended."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.loggers.test_remote import Memory, updates
from w2vscale.config import Config
from w2vscale.loggers import mlflow
from w2vscale.loggers.remote import RemoteLogger
from w2vscale.objectives.settings import load_settings
from w2vscale.training import loop
from w2vscale.training.finished import finished_run
from w2vscale.training.train import train

SETTINGS = (
    *MICRO_RUN, "model.layers=1", "batch.micro_batches=1", "batch.max_seconds=4", "logging.every=1",
    "trainer.validate_every=2", "trainer.updates=4", "logging.mlflow=here",
)  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """The service of all runs of a test, in place of MLflow."""
    memory = Memory()
    memory.setting = "logging.mlflow=here"
    monkeypatch.setattr(mlflow, "MlflowService", lambda place, facts: memory)
    return memory


def settings(corpus: SmallCorpus, *overrides: str) -> Config:
    data = [f"data.train={corpus.train}", f"data.validation={corpus.validation}"]
    return load_settings("base", [*SETTINGS, *data, *overrides])


def splits(service: Memory) -> dict[int, set[str]]:
    """Splits by update, of the only run."""
    (rows,) = service.runs.values()
    assert len({row.update for row in rows}) == len(rows)
    return {row.update: set(row.scalars) for row in rows}


@pytest.mark.parametrize("at", [2, 4])
def test_a_validation_that_a_signal_ended_is_delivered_with_its_update(
    at: int, small_corpus: SmallCorpus, service: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = loop.Trainer._validate

    def signalled(trainer: loop.Trainer) -> None:
        if trainer.state.update == at:
            trainer.stop.received = signal.SIGTERM
        working(trainer)

    monkeypatch.setattr(loop.Trainer, "_validate", signalled)
    assert train(settings(small_corpus), tmp_path / "exp") == 128 + signal.SIGTERM
    assert updates(service) == [list(range(at))]
    monkeypatch.undo()
    monkeypatch.setattr(mlflow, "MlflowService", lambda place, facts: service)
    assert train(settings(small_corpus), tmp_path / "exp") == 0
    assert splits(service) == {
        0: set(), 1: {"train"}, 2: {"train", "validation"}, 3: {"train"}, 4: {"train", "validation"},
    }  # fmt: skip


def test_a_run_that_a_signal_stops_delivers_its_last_update(
    small_corpus: SmallCorpus, service: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = loop.Trainer._log_validate_save

    def signalled(trainer: loop.Trainer) -> object:
        if trainer.state.update == 3:
            trainer.stop.received = signal.SIGTERM
        return working(trainer)

    monkeypatch.setattr(loop.Trainer, "_log_validate_save", signalled)
    assert train(settings(small_corpus, "logging.every=50"), tmp_path / "exp") == 128 + signal.SIGTERM
    assert splits(service) == {0: set(), 2: {"validation"}, 3: {"train"}}


def test_a_finished_run_delivers_what_is_missing_when_it_is_started_again(
    small_corpus: SmallCorpus,
    service: Memory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, exp = settings(small_corpus), tmp_path / "exp"
    service.down = True
    assert train(config, exp, command=["train"]) == 0
    assert not service.runs and finished_run(config, exp, print) is None
    service.down = False
    assert train(config, exp, command=["train"]) == 0
    assert updates(service) == [list(range(5))] and splits(service)[4] == {"train", "validation"}
    assert finished_run(config, exp, print) is not None
    service.down = True  # it is not even asked
    monkeypatch.setattr(Memory, "open", None)
    assert train(config, exp, command=["train"]) == 0
    assert finished_run(config, exp, print) is not None


def test_a_run_that_is_killed_before_it_has_delivered_everything_is_not_finished(
    small_corpus: SmallCorpus, service: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, exp = settings(small_corpus), tmp_path / "exp"
    with monkeypatch.context() as patched:
        patched.setattr(RemoteLogger, "close", lambda logger: None)
        assert train(config, exp, command=["train"]) == 0
    assert finished_run(config, exp, print) is None


def test_a_resume_that_replaces_a_part_of_the_curve_is_a_new_run(
    small_corpus: SmallCorpus, service: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = tmp_path / "exp"
    assert train(settings(small_corpus, "checkpoint.every=2", "checkpoint.keep_last=9"), exp) == 0
    older = str(exp / "checkpoints" / "update_00000002")
    assert train(settings(small_corpus, "checkpoint.every=2", "checkpoint.keep_last=9"), exp, resume=older) == 0
    assert train(settings(small_corpus, "checkpoint.every=2", "checkpoint.keep_last=9", "trainer.updates=6"), exp) == 0
    first, second = service.runs
    assert second == f"{first}-restart-1" and service.who.group == first
    assert updates(service) == [list(range(5)), list(range(7))]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "updates 3 to 4 are logged again, with the checkpoint of --resume: W&B and MLflow get them as a new run"
        in printed
    )
    for path in (exp / "checkpoints").glob("update_0000000[46]"):
        shutil.rmtree(path)
    assert train(settings(small_corpus, "checkpoint.every=2", "checkpoint.keep_last=9", "optim.lr=0.1"), exp) == 0
    assert updates(service)[2:] == [list(range(5))] and list(service.runs)[2] == f"{first}-restart-2"
    losses = [run[4].scalars["train"]["loss"] for run in service.runs.values()]
    assert losses[0] == losses[1] != losses[2]
