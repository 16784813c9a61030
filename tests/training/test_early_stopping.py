"""Early stopping: where a run ends, and that neither a resume nor another engine changes it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.cli.test_fast import outcomes
from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.analysis.report.reading import read_run
from w2vscale.checkpoint.format import BestValidation, committed, update_of
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.files import read_metrics, read_records
from w2vscale.objectives.settings import load_settings
from w2vscale.runs import Run
from w2vscale.training import loop
from w2vscale.training.early_stopping import best_validation
from w2vscale.training.finished import finished_run
from w2vscale.training.train import train

SETTINGS = (
    *MICRO_RUN, "model.layers=1", "batch.micro_batches=1", "batch.max_seconds=4", "trainer.updates=20",
    "trainer.validate_every=2", "trainer.early_stopping=2", "checkpoint.keep_best=1", "checkpoint.keep_last=1",
)  # fmt: skip


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The loss of the validation at each update, in place of the real one."""
    scripted: dict[int, float] = {}
    working = loop.Trainer._metrics_of

    def metrics_of(trainer: loop.Trainer, name: str | None) -> dict[str, float]:
        return working(trainer, name) | {"loss": scripted[trainer.state.update]}

    monkeypatch.setattr(loop.Trainer, "_metrics_of", metrics_of)
    return scripted


def run(corpus: SmallCorpus, exp: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """Train; what was printed, on one line."""
    data = [f"data.train={corpus.train}", f"data.validation={corpus.validation}"]
    capsys.readouterr()
    assert train(load_config("base", [*SETTINGS, *data, *settings]), exp) == 0
    return " ".join(capsys.readouterr().out.split())


def reached(exp: Path) -> tuple[int, list[int]]:
    """The update of the newest checkpoint, and those of the log lines."""
    lines = [line["update"] for line in read_metrics(exp / "metrics.jsonl", "train")]
    return open_checkpoint(exp).state.update, lines


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], BestValidation("loss", 3.0, 2)),
        ([3.0, 2.0, 2.5], BestValidation("loss", 2.0, 4, 1)),
        ([3.0, 2.0, 2.0, 2.0], BestValidation("loss", 2.0, 4, 2)),
        ([3.0, 4.0, 5.0, 2.9], BestValidation("loss", 2.9, 8)),
        ([math.nan, 2.0, math.inf, math.nan], BestValidation("loss", 2.0, 4, 2)),
        ([math.nan, math.nan], BestValidation("loss", since=2)),
    ],
)
def test_the_best_validation_and_those_since(values: list[float], expected: BestValidation) -> None:
    best = None
    for number, value in enumerate(values, 1):
        best = best_validation(best, "loss", value, 2 * number)
    assert best == expected
    another = best_validation(best, "wer", 0.9, 20)
    assert another == BestValidation("wer", 0.9, 20), "the count of another metric starts from zero"


def test_a_run_ends_names_the_best_checkpoint_and_says_so_again(
    small_corpus: SmallCorpus, losses: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = tmp_path / "exp"
    losses |= {2: 5.0, 4: 3.0, 6: 3.0, 8: math.nan, 10: 2.0, 12: 4.0, 14: 1.0, 16: 0.0, 18: 0.0, 20: 0.0}
    printed = run(small_corpus, exp, capsys, "checkpoint.every=4", "logging.every=3")
    assert Run(exp).complete and read_run(exp).state == "complete: stopped early at update 8 of 20"
    best = exp / "checkpoints" / "update_00000004"
    reason = "stopped early at update 8 (trainer.early_stopping=2): 2 validations without a loss below 3, that of"
    assert f"{reason} update 4. {best} is the best; commands use the newest unless they name it. A higher" in printed
    assert reached(exp) == (8, [3, 4, 6, 8])
    assert [update_of(path) for path in committed(exp / "checkpoints")] == [4, 8]

    before = [(exp / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")]
    again = run(small_corpus, exp, capsys, "checkpoint.every=4", "logging.every=7")
    assert f"nothing to do: {reason}" in again
    assert read_run(exp).state == "complete: stopped early at update 8 of 20"
    assert [(exp / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")] == before

    printed = run(small_corpus, exp, capsys, "checkpoint.every=4", "trainer.early_stopping=3")
    assert "stopped early" not in printed and reached(exp)[0] == 20


def test_the_same_command_imports_no_large_library(
    small_corpus: SmallCorpus, losses: dict[int, float], tmp_path: Path
) -> None:
    exp = tmp_path / "exp"
    losses |= {2: 1.0, 4: 2.0, 6: 3.0}
    data = [f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}"]
    assert train(load_settings("base", [*SETTINGS, *data]), exp, command=["train", "base"]) == 0
    ((_, code, printed, slow),) = outcomes([["train", "base", *SETTINGS, *data, f"--exp={exp}"]])
    assert code == 0 and not slow
    assert "nothing to do: stopped early at update 6 (trainer.early_stopping=2): 2 validations without" in printed
    assert finished_run(load_settings("base", [*SETTINGS, *data, "trainer.early_stopping=3"]), exp, print) is None


def test_it_ends_at_an_update_that_is_neither_logged_nor_saved_otherwise(
    small_corpus: SmallCorpus, losses: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 3.0}
    printed = run(small_corpus, tmp_path / "exp", capsys, "checkpoint.every=50", "logging.every=50")
    assert "that of update 2. It was not kept (keep_best). A higher trainer.early_stopping" in printed
    assert reached(tmp_path / "exp") == (6, [6])


@pytest.mark.parametrize(("every", "updates"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (50, [6])])
def test_the_histograms_of_its_last_update_are_made_once(
    every: int,
    updates: list[int],
    small_corpus: SmallCorpus,
    losses: dict[int, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 3.0}
    run(small_corpus, tmp_path, capsys, "logging.every=1", f"logging.histograms_every={every}")
    notes = [note for note in read_records(tmp_path / "logs" / "notes.jsonl") if "histogram" in note]
    assert [note["update"] for note in notes if note["name"] == "weights/quantizer.codevectors"] == updates


def test_a_run_that_starts_from_a_checkpoint_of_another_knows_its_best_validation(
    small_corpus: SmallCorpus, losses: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 3.0}
    run(small_corpus, tmp_path / "one", capsys, "checkpoint.every=2", "checkpoint.keep_last=9")
    start = tmp_path / "one" / "checkpoints" / "update_00000004"
    data = [f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}"]
    assert train(load_config("base", [*SETTINGS, *data]), tmp_path / "other", resume=str(start)) == 0
    assert reached(tmp_path / "other") == (6, [5, 6])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_resume_on_any_engine_ends_at_the_same_update(
    engine: str,
    small_corpus: SmallCorpus,
    losses: dict[int, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted after one of the two validations. Update 8 was validated, too, but its checkpoint is lost."""
    exp = tmp_path / "exp"
    losses |= {2: 1.0, 4: 2.0, 6: 0.5, 8: 0.1, 9: 0.1}
    settings = ("checkpoint.every=3", "checkpoint.keep_last=9", "trainer.early_stopping=9", "trainer.updates=9")
    run(small_corpus, exp, capsys, *settings)
    for path in committed(exp / "checkpoints"):
        if update_of(path) > 6:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    losses |= {8: 0.6, 10: 0.7, 12: 0.0}
    printed = run(small_corpus, exp, capsys, "checkpoint.every=3", f"engine.name={engine}")
    assert "resumed from" in printed and "at update 6" in printed
    assert "stopped early at update 10" in printed and "below 0.5, that of update 6" in printed
    assert reached(exp)[0] == 10


def test_it_needs_a_validation_set() -> None:
    with pytest.raises(UserError, match=r"trainer\.early_stopping=2 needs data\.validation"):
        load_config("base", ["trainer.early_stopping=2"])
