"""`trainer.max_hours`: the run saves in time, ends with the code that has a scheduler start it again, and continues."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import load_config
from w2vscale.files import read_metrics
from w2vscale.training import time_limit
from w2vscale.training.loop import Trainer
from w2vscale.training.time_limit import TimeLimit
from w2vscale.training.train import train


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in place of the real one."""
    now = [1000.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    return now


class TestTheLimit:
    def test_leaves_the_time_for_another_update_and_two_saves(self, clock: list[float]) -> None:
        limit = TimeLimit(1.0, grace=120.0)
        assert limit.deadline == 4600.0
        for now, over in ((1000.0, False), (4539.0, False), (4541.0, True), (5000.0, True)):
            clock[0] = now
            assert limit.reached(save_seconds=20.0, update_seconds=20.0) == over

    def test_knows_no_update_and_no_save_at_first(self, clock: list[float]) -> None:
        """5 % of the time for the first save, but at most the grace time."""
        for hours, grace, last in ((1.0, 120.0, 4480.0), (0.1, 120.0, 1342.0)):
            clock[0] = 1000.0
            limit = TimeLimit(hours, grace=grace)
            for now, over in ((last - 1, False), (last + 1, True)):
                clock[0] = now
                assert limit.reached(save_seconds=None, update_seconds=float("inf")) == over

    def test_counts_from_when_the_command_began(self, clock: list[float]) -> None:
        assert TimeLimit(1.0, grace=120.0, began=700.0).deadline == 4300.0

    def test_none_is_never_reached(self, clock: list[float]) -> None:
        limit = TimeLimit(None, grace=120.0)
        clock[0] = 1e12
        assert not limit.reached(save_seconds=1e9, update_seconds=1e9)


def losses(exp: Path) -> list[tuple[int, float]]:
    return [(line["update"], line["loss"]) for line in read_metrics(exp / "metrics.jsonl", "train")]


def test_a_run_saves_in_time_and_the_same_command_continues_it(
    small_corpus: SmallCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [*MICRO_RUN, f"data.train={small_corpus.train}", "model.layers=1", "checkpoint.every=5"]
    assert train(load_config("base", settings), tmp_path / "whole") == 0

    working = Trainer._update

    def slow(trainer: Trainer, windows: object) -> None:
        time.sleep(0.2 if trainer.state.update < 7 else 0.0)
        working(trainer, windows)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_update", slow)
    began = time.monotonic()
    exp, hours = tmp_path / "exp", 1.5 / 3600
    capsys.readouterr()
    assert train(load_config("base", [*settings, f"trainer.max_hours={hours}"]), exp) == 75
    taken = time.monotonic() - began
    printed = " ".join(capsys.readouterr().out.split())
    assert f"stopped by trainer.max_hours={hours:g}; the same command continues from here" in printed
    reached = open_checkpoint(exp).state.update
    assert 0 < reached < 12 and [update for update, _ in losses(exp)] == list(range(1, reached + 1))
    assert json.loads((exp / "checkpoints" / "latest" / "train_state.json").read_text())["update"] == reached
    assert taken < 60  # a machine that is not hung

    monkeypatch.undo()
    assert train(load_config("base", [*settings, "trainer.max_hours=1"]), exp) == 0
    assert losses(exp) == losses(tmp_path / "whole")


def test_a_time_without_an_update_says_so(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.max_hours=1e-9"]
    assert train(load_config("base", settings), tmp_path / "exp") == 75
    printed = " ".join(capsys.readouterr().out.split())
    assert "stopped by trainer.max_hours=1e-09; the same command starts again: no update was complete" in printed


def test_it_ends_a_validation_which_is_done_when_the_run_continues(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*MICRO_RUN, f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}"]
    config = load_config("base", [*settings, "model.layers=1", "trainer.validate_every=4", "trainer.max_hours=1"])
    working = Trainer._metrics_of

    def late(trainer: Trainer, name: str | None) -> dict[str, float]:
        trainer.limit.deadline = 0.0
        return working(trainer, name)

    monkeypatch.setattr(Trainer, "_metrics_of", late)
    assert train(config, tmp_path / "exp") == 75
    assert open_checkpoint(tmp_path / "exp").state.update == 4
    monkeypatch.undo()
    assert train(config, tmp_path / "exp") == 0
    assert [line["update"] for line in read_metrics(tmp_path / "exp" / "metrics.jsonl", "validation")] == [4, 8, 12]
