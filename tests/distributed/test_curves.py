"""The curve does not depend on the number of processes, nor on how many micro-batches share a forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro
from tests.helpers.tiers import long

pytestmark = pytest.mark.distributed

TWENTY = ("trainer.updates=20", "checkpoint.every=1000")
NO_DROPOUT = (
    *(f"regularization.{name}=0.0" for name in ("dropout", "attention_dropout", "input_dropout", "layerdrop")),
    "objective.feature_dropout=0.0",
)


@pytest.fixture
def corpus(small_corpus: SmallCorpus) -> Path:
    return small_corpus.train


def test_one_and_two_processes_learn_alike(pool: Callable[[int], Pool], corpus: Path, tmp_path: Path) -> None:
    """With dropout and LayerDrop on, clipping active, validation included."""
    settings = (*TWENTY, f"data.validation={corpus}", "trainer.validate_every=10")
    alone = train_micro(str(corpus), str(tmp_path / "alone"), settings)
    two = pool(2).run(train_micro, str(corpus), str(tmp_path / "two"), settings)[0]
    assert len(alone) == 22
    assert two == pytest.approx(alone, rel=1e-4)


def test_four_processes_that_skip_half_of_the_layers_learn_like_one(
    pool: Callable[[int], Pool], corpus: Path, tmp_path: Path
) -> None:
    """DDP is not asked to search for parameters without a gradient. Two micro-batches per process."""
    settings = ("trainer.updates=8", "regularization.layerdrop=0.5", "batch.micro_batches=8", "batch.max_seconds=4")
    alone = train_micro(str(corpus), str(tmp_path / "alone"), settings)
    assert pool(4).run(train_micro, str(corpus), str(tmp_path / "four"), settings)[0] == pytest.approx(alone, rel=1e-4)


def test_norms_and_audio_agree_across_processes(pool: Callable[[int], Pool], corpus: Path, tmp_path: Path) -> None:
    records = []
    for name, run in (("alone", lambda *a: train_micro(*a)), ("two", lambda *a: pool(2).run(train_micro, *a)[0])):
        run(str(corpus), str(tmp_path / name), ("trainer.updates=4",))
        records.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*records, strict=True):
        for key in ("grad_norm", "hours_seen", "masked_fraction", "accuracy", "code_perplexity_0", "padding"):
            assert other[key] == pytest.approx(one[key], rel=1e-3), key


@pytest.fixture(scope="module")
def apart(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of one micro-batch a forward, without dropout."""
    return train_micro(str(small_corpus.train), str(tmp_path_factory.mktemp("runs") / "apart"), (*TWENTY, *NO_DROPOUT))


@pytest.mark.parametrize("concat", [2, long(3)])
def test_concatenation_does_not_change_the_curve(apart: list[float], corpus: Path, tmp_path: Path, concat: int) -> None:
    together = train_micro(str(corpus), str(tmp_path / "together"), (*TWENTY, *NO_DROPOUT, f"batch.concat={concat}"))
    assert together == pytest.approx(apart, rel=1e-4)


def test_a_run_continues_on_another_number_of_processes(
    pool: Callable[[int], Pool], corpus: Path, tmp_path: Path
) -> None:
    """Six updates alone, six more on two processes: the curve of twelve alone."""
    whole = train_micro(str(corpus), str(tmp_path / "whole"))
    split = tmp_path / "split"
    first = train_micro(str(corpus), str(split), ("checkpoint.every=6", "checkpoint.keep_last=2"))
    assert first == whole
    (split / "checkpoints" / "latest").unlink()
    shutil.rmtree(split / "checkpoints" / "update_00000012")
    continued = pool(2).run(train_micro, str(corpus), str(split), ("checkpoint.every=6",))[0]
    assert continued == pytest.approx(whole, rel=1e-4)
    assert continued[:6] == whole[:6]
