"""BEST-RQ learns the same under every engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro
from tests.helpers.tiers import long_except
from tools.bench.engine_parity import ENGINES

pytestmark = pytest.mark.distributed

SETTINGS = (
    "objective.name=best_rq",
    "objective.codebooks=3",
    "objective.codebook_entries=12",
    "trainer.updates=8",
    "trainer.validate_every=4",
)


@pytest.fixture(scope="module")
def alone(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Training and validation losses of one process, with dropout and LayerDrop on."""
    settings = (*SETTINGS, f"data.validation={small_corpus.validation}")
    return train_micro(str(small_corpus.train), str(tmp_path_factory.mktemp("best-rq")), settings)


@pytest.mark.parametrize("engine", long_except({"ddp", "zero3"}, ENGINES))
def test_two_processes_learn_what_one_learns(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, alone: list[float], tmp_path: Path, engine: str
) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    settings = (*SETTINGS, f"data.validation={small_corpus.validation}", ENGINES[engine])
    found = pool(2).run(train_micro, str(small_corpus.train), str(tmp_path), settings)[0]
    assert len(found) == len(alone) == 10
    assert found == pytest.approx(alone, rel=1e-5)
