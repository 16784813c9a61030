"""Several validation sets: each has its own metrics, and the main one alone ranks checkpoints."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.files import read_metrics
from w2vscale.training import loop
from w2vscale.training.train import train

SETTINGS = (*MICRO_RUN, "model.layers=1", "batch.micro_batches=2", "trainer.updates=4", "trainer.validate_every=2")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Three utterances that are in no other set."""
    cuts = [cut_of(write_audio(tmp_path / f"o{seed}.flac", noise(1.5, seed=seed))) for seed in range(90, 93)]
    return write_manifest(tmp_path / "other.jsonl", cuts)


def settings(corpus: SmallCorpus, other: Path) -> list[str]:
    sets = [f"data.validation_sets={{other-1: {other}, both_2: [{corpus.validation}, {other}]}}"]
    return [*SETTINGS, f"data.train={corpus.train}", f"data.validation={corpus.validation}", *sets]


def test_each_set_has_the_metrics_that_evaluate_finds(
    small_corpus: SmallCorpus, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = tmp_path / "exp"
    assert train(load_config("base", settings(small_corpus, other)), exp) == 0
    printed = capsys.readouterr().out
    sets = {
        "validation": [small_corpus.validation],
        "validation_other-1": [other],
        "validation_both_2": [small_corpus.validation, other],
    }
    for split, manifests in sets.items():
        lines = read_metrics(exp / "metrics.jsonl", split)
        assert [line["update"] for line in lines] == [2, 4]
        found = evaluate_checkpoint(exp, manifests)
        assert found is not None and lines[-1]["loss"] == pytest.approx(found.metrics["loss"], rel=1e-6)
        assert f"update 4/4  {split.replace('_', ' ', 1)}: " in printed
    assert [line["utterances"] for split in sets for line in read_metrics(exp / "metrics.jsonl", split)[:1]] == [
        6,
        3,
        9,
    ]
    main = read_metrics(exp / "metrics.jsonl", "validation")[-1]
    assert open_checkpoint(exp).state.validation["loss"] == main["loss"]


def test_nothing_is_written_of_a_validation_that_a_signal_ends(
    small_corpus: SmallCorpus, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the last set. The run that continues validates again, on all sets, once."""
    exp, config = tmp_path / "exp", load_config("base", settings(small_corpus, other))
    working = loop.Trainer._metrics_of

    def signalled(trainer: loop.Trainer, name: str | None) -> dict[str, float]:
        if name == "both_2":
            trainer.stop.received = signal.SIGTERM
        return working(trainer, name)

    monkeypatch.setattr(loop.Trainer, "_metrics_of", signalled)
    assert train(config, exp) == 128 + signal.SIGTERM
    assert open_checkpoint(exp).state.update == 2 and not read_metrics(exp / "metrics.jsonl", "validation")
    monkeypatch.undo()
    assert train(config, exp) == 0
    for split in ("validation", "validation_other-1", "validation_both_2"):
        assert [line["update"] for line in read_metrics(exp / "metrics.jsonl", split)] == [2, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.validation_sets.Other=a.jsonl",
            "validation_sets.Other: the name of a set consists of a-z, 0-9, _",
        ),
        ("data.validation_sets.a b=a.jsonl", "validation_sets.a b: the name"),
        ("data.validation_sets.other=[]", "validation_sets.other: names no manifest"),
        ("data.validation=[]", "validation_sets need data.validation"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    given = ["data.validation=a.jsonl", "data.validation_sets.dev=b.jsonl", override]
    with pytest.raises(UserError) as caught:
        load_config("base", given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_manifest_is_named(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    given = [*SETTINGS, f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}"]
    config = load_config("base", [*given, "data.validation_sets.far=missing.jsonl"])
    with pytest.raises(UserError, match=r"missing\.jsonl: no such manifest"):
        train(config, tmp_path / "exp")
