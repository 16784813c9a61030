"""Whatever fails after the engine is built, the engine is closed."""

from __future__ import annotations

from pathlib import Path

import pytest

import w2vscale.training.train
from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import Config, load_config
from w2vscale.engine.ddp import DDPEngine
from w2vscale.errors import UserError
from w2vscale.training import run as run_module
from w2vscale.training.dry_run import dry_run
from w2vscale.training.train import train


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[DDPEngine]:
    """The engines that were closed."""
    engines: list[DDPEngine] = []
    monkeypatch.setattr(DDPEngine, "close", lambda self: engines.append(self))
    return engines


def settings(corpus: SmallCorpus) -> Config:
    updates = ("trainer.updates=2", "schedule.warmup_updates=1")
    return load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", *updates])


def refuse(*arguments: object, **named: object) -> None:
    raise UserError("refused")


@pytest.mark.parametrize("method", ["import_values", "run_window"])
def test_if_it_fails_in_a_run_or_a_dry_run(
    method: str, small_corpus: SmallCorpus, tmp_path: Path, closed: list[DDPEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DDPEngine, method, refuse)
    with pytest.raises(UserError, match="refused"):
        train(settings(small_corpus), tmp_path / "exp")
    with pytest.raises(UserError, match="refused"):
        dry_run(settings(small_corpus))
    assert len(closed) == 2


def test_if_the_folder_cannot_be_made_or_calibration_fails(
    small_corpus: SmallCorpus, tmp_path: Path, closed: list[DDPEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full" / "config.yaml").mkdir(parents=True)
    with pytest.raises(UserError, match="the folder of the run cannot be written"):
        train(settings(small_corpus), tmp_path / "full")
    monkeypatch.setattr(w2vscale.training.train, "micro_batches_per_forward", refuse)
    with pytest.raises(UserError, match="refused"):
        train(settings(small_corpus), tmp_path / "exp")
    assert len(closed) == 2


def test_if_a_checkpoint_cannot_be_imported(
    small_corpus: SmallCorpus, tmp_path: Path, closed: list[DDPEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(settings(small_corpus), tmp_path) == 0
    monkeypatch.setattr(DDPEngine, "import_state", refuse)
    with pytest.raises(UserError, match="refused"):
        train(settings(small_corpus), tmp_path)
    assert len(closed) == 2


def test_a_resumed_run_builds_its_objective_once(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(settings(small_corpus), tmp_path) == 0
    built = []
    resolve = run_module.resolve
    monkeypatch.setattr(run_module, "resolve", lambda config: built.append(config) or resolve(config))
    assert train(settings(small_corpus), tmp_path) == 0
    assert len(built) == 1
