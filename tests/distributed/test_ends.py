"""Two ranks end together: when a run stops early, and when the time of one of them is over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.spelled import SPELLING, some_texts, write_spelled
from tests.helpers.tasks import train_micro, train_until_time_is_over, train_with_a_callback_on_rank_0
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.files import read_metrics

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "fsdp")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stops_early_on_all_ranks(engine: str, pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """By the word error rate of an untrained model, which stays at 1."""
    corpus = write_spelled(tmp_path / "corpus", some_texts(4))
    settings = (
        *SPELLING, f"data.validation={corpus}", "model.layers=1", "batch.micro_batches=2", f"engine.name={engine}",
        "optim.lr=1e-7", "trainer.best_metric=wer", "trainer.validate_every=1", "trainer.early_stopping=2",
    )  # fmt: skip
    pool(2).run(train_micro, str(corpus), str(tmp_path / "exp"), settings)
    assert open_checkpoint(tmp_path / "exp").state.update == 3
    assert [line["update"] for line in read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")] == [1, 2, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_time_of_one_rank_ends_all(
    engine: str, small_corpus: SmallCorpus, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    settings = ("model.layers=1", f"engine.name={engine}")
    codes = pool(2).run(train_until_time_is_over, str(small_corpus.train), str(tmp_path), settings, 5)
    assert codes == [75, 75]
    state = json.loads((tmp_path / "checkpoints" / "latest" / "train_state.json").read_text())
    assert 0 < state["update"] < 12
    assert len(pool(2).run(train_micro, str(small_corpus.train), str(tmp_path), settings)[0]) == 12


def test_a_function_of_one_rank_gets_complete_checkpoints(
    small_corpus: SmallCorpus, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    seen = pool(2).run(train_with_a_callback_on_rank_0, str(small_corpus.train), str(tmp_path))
    assert seen == [[4, 8, 12], []]


def test_ranks_share_each_validation_set(
    small_corpus: SmallCorpus, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    sets = (f"data.validation={small_corpus.validation}", f"data.validation_sets.train={small_corpus.train}")
    settings = ("trainer.updates=2", "schedule.warmup_updates=1", "model.layers=1", *sets)
    train_micro(str(small_corpus.train), str(tmp_path / "one"), settings)
    pool(2).run(train_micro, str(small_corpus.train), str(tmp_path / "two"), settings)
    for split, count in (("validation", 6), ("validation_train", 24)):
        (one,), (two,) = (read_metrics(tmp_path / name / "metrics.jsonl", split) for name in ("one", "two"))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert one["utterances"] == two["utterances"] == count
