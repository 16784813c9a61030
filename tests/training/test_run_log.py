"""The logs of a run: what happened, and at which update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.analysis.events import read_events
from w2vscale.config import LoggingConfig, load_config
from w2vscale.errors import UserError
from w2vscale.files import read_records
from w2vscale.training.callbacks import Callbacks
from w2vscale.training.run_log import RunLog
from w2vscale.training.summary import tracking
from w2vscale.training.train import train


@pytest.mark.parametrize(
    ("error", "text"),
    [(UserError("no space"), "no space"), (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero")],
)
def test_an_error_is_recorded_with_its_update(
    small_corpus: SmallCorpus, tmp_path: Path, error: Exception, text: str
) -> None:
    settings = [*MICRO_RUN, "model.layers=1", "batch.micro_batches=1", f"data.train={small_corpus.train}"]

    def fail(update: int, metrics: Mapping[str, float]) -> None:
        if update == 3:
            raise error

    with pytest.raises(type(error)):
        train(load_config("base", settings), tmp_path, callbacks=Callbacks(on_update=fail))
    stopped = read_events(tmp_path).stopped
    assert stopped is not None and (stopped.update, stopped.text) == (3, text)
    assert text in (tmp_path / "logs" / "train.log").read_text()


def test_what_happens_before_there_is_a_folder_is_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.open()
    log.event("warning", text="early")
    (tmp_path / "checkpoints" / "update_00000004").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    assert read_events(tmp_path).happened == ()
    log.open()
    log.event("warning", text="late")
    assert [(one["text"], one["update"]) for one in read_records(tmp_path / "logs" / "events.jsonl")] == [
        ("early", 4), ("late", 4),
    ]  # fmt: skip
    assert [one.text for one in read_events(tmp_path).distinct()] == ["early", "late"]


def test_the_start_names_tracking_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking(LoggingConfig(wandb="demo", mlflow="runs/")) == ["W&B project demo (offline)", "MLflow runs/"]
    assert tracking(LoggingConfig()) == []
