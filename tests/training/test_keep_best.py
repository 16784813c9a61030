"""`checkpoint.keep_best`: the checkpoints with the lowest validation loss are kept and can be averaged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.micro import MICRO_RUN
from tests.helpers.spelled import SPELLED, SPELLING, some_texts, write_spelled
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.format import committed, update_of
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.files import read_metrics
from w2vscale.training import loop
from w2vscale.training.train import train


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The losses of the next validations, in place of the real ones."""
    to_come: list[float] = []
    validate = loop.validate

    def scripted(*arguments: Any) -> Any:
        return validate(*arguments) | {"loss": to_come.pop(0)}

    monkeypatch.setattr(loop, "validate", scripted)
    yield to_come
    assert not to_come


def kept(exp: Path) -> dict[int, float | None]:
    """Update and validation loss of each checkpoint."""
    states = {update_of(path): open_checkpoint(path).state for path in sorted(committed(exp / "checkpoints"))}
    return {update: state.validation.get("loss") for update, state in states.items()}


@pytest.mark.parametrize("objective", [SPELLING, (*MICRO_RUN, *SPELLED)], ids=["fine-tuning", "pretraining"])
def test_the_best_are_kept_over_a_resume_and_averaged(
    objective: tuple[str, ...], losses: list[float], tmp_path: Path
) -> None:
    """Saved after every update, validated after every second."""
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = [
        *objective, f"data.train={corpus}", f"data.validation={corpus}", "checkpoint.every=1", "checkpoint.keep_last=1",
        "checkpoint.keep_best=2", "trainer.validate_every=2", "batch.micro_batches=1", "model.layers=1",
    ]  # fmt: skip
    exp = tmp_path / "exp"
    losses += [1.0, math.inf, 3.0, 4.0]
    assert train(load_config("base", [*settings, "trainer.updates=7"]), exp) == 0
    assert kept(exp) == {2: 1.0, 6: 3.0, 7: 4.0}

    losses += [2.0, 5.0, 6.0]
    assert train(load_config("base", [*settings, "trainer.updates=11"]), exp) == 0
    assert kept(exp) == {2: 1.0, 8: 2.0, 11: 6.0}
    validated = {record["update"]: record["loss"] for record in read_metrics(exp / "metrics.jsonl", "validation")}
    assert validated == {2: 1.0, 4: None, 6: 3.0, 7: 4.0, 8: 2.0, 10: 5.0, 11: 6.0}

    assert average(exp, tmp_path / "mean", best=2).scores == {2: 1.0, 8: 2.0}
    average(exp, tmp_path / "one", best=1)
    mean, one, same = (
        evaluate_checkpoint(path, [corpus])
        for path in (tmp_path / "mean", tmp_path / "one", exp / "checkpoints" / "update_00000002")
    )
    assert mean is not None and one is not None and same is not None
    assert one.metrics == same.metrics
    assert (mean.update, math.isfinite(mean.metrics["loss"])) == (8, True)
    assert mean.metrics["loss"] != one.metrics["loss"]


def test_without_validation_there_is_no_best() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep_best=3 needs data\.validation"):
        load_config("base", ["checkpoint.keep_best=3"])


def test_fine_tuning_keeps_the_lowest_word_error_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = [
        *SPELLING, f"data.train={corpus}", f"data.validation={corpus}", "checkpoint.every=1", "checkpoint.keep_last=1",
        "checkpoint.keep_best=1", "trainer.validate_every=1", "batch.micro_batches=1", "model.layers=1",
        "trainer.best_metric=wer", "trainer.updates=4",
    ]  # fmt: skip
    to_come = [
        {"loss": 3.0, "wer": 0.9},
        {"loss": 2.0, "wer": 0.4},
        {"loss": 1.0, "wer": 0.6},
        {"loss": 0.5, "wer": 0.7},
    ]
    validate = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *arguments: validate(*arguments) | to_come.pop(0))
    exp = tmp_path / "exp"
    assert train(load_config("base", settings), exp) == 0
    assert kept(exp) == {2: 2.0, 4: 0.5}
    found = average(exp, tmp_path / "mean", best=2)
    assert (found.metric, found.scores) == ("wer", {2: 0.4, 4: 0.7})
    shown = CliRunner().invoke(app, ["checkpoint", "show", str(exp / "checkpoints" / "update_00000002")]).output
    assert "validation loss" in shown and "validation wer" in shown and "0.4" in shown


def test_a_validation_without_the_metric_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = [*SPELLING, f"data.train={corpus}", f"data.validation={corpus}", "trainer.updates=2", "model.layers=1"]
    validate = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *arguments: validate(*arguments) | {"loss": math.nan})
    assert train(load_config("base", [*settings, "schedule.warmup_updates=1"]), tmp_path / "exp") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: the validation has no finite loss (trainer.best_metric)" in printed
    assert "loss" not in open_checkpoint(tmp_path / "exp").state.validation


def test_validations_without_a_checkpoint_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = [*SPELLING, f"data.train={corpus}", f"data.validation={corpus}", "trainer.updates=2", "model.layers=1"]
    own = ["schedule.warmup_updates=1", "checkpoint.keep_best=1", "checkpoint.every=6", "trainer.validate_every=4"]
    assert train(load_config("base", [*settings, *own]), tmp_path / "exp") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint.every=6 does not divide trainer.validate_every=4" in printed


def test_real_validation_reports_a_word_error_rate(tmp_path: Path) -> None:
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = [*SPELLING, f"data.train={corpus}", f"data.validation={corpus}", "trainer.updates=4", "model.layers=1"]
    assert train(load_config("base", settings), tmp_path / "exp") == 0
    (record,) = read_metrics(tmp_path / "exp" / "metrics.jsonl", "validation")
    assert record["wer"] >= 1.0 and record["wer"] == open_checkpoint(tmp_path / "exp").state.validation["wer"]
    evaluated = evaluate_checkpoint(tmp_path / "exp", [corpus])
    assert evaluated is not None and evaluated.metrics["wer"] == record["wer"]
    assert "wer" not in read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SPELLING, "objective.name=ctc has no such error metric; choose loss or label_error_rate or wer"),
        ((*MICRO_RUN, *SPELLED), "objective.name=wav2vec2 has no such error metric; choose loss"),
    ],
)
def test_a_metric_that_does_not_exist_is_an_error(settings: tuple[str, ...], message: str, tmp_path: Path) -> None:
    corpus = write_spelled(tmp_path / "corpus", some_texts(2))
    config = load_config("base", [*settings, f"data.train={corpus}", "trainer.best_metric=cer"])
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "exp")
    assert str(caught.value) == f"trainer.best_metric=cer: {message}"
    assert not (tmp_path / "exp").exists()
