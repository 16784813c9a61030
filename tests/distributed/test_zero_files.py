"""Keys of DeepSpeed that a file may set: whatever they are, the run is DDP's, and it resumes bit for bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.six_updates import SIX, assert_same, assert_same_bits, first_three
from tests.helpers.tasks import train_micro
from tests.helpers.tiers import long_except
from tests.helpers.zero_files import ZERO_FILES, write_zero_file

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def ddp(pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates, validated after every second one."""
    exp = tmp_path_factory.mktemp("zero-files") / "ddp"
    pool(2).run(train_micro, str(small_corpus.train), str(exp), settings(small_corpus, "engine.name=ddp"))
    return exp


HIERARCHICAL = ("zero3_partitioned", "hpz", "hpz_persistent", "hpz_host", "hpz_sequential")
"""These are in test_hierarchical.py."""


def settings(corpus: SmallCorpus, engine: str) -> tuple[str, ...]:
    return (
        *SIX, "batch.micro_batches=4", f"data.validation={corpus.validation}", "trainer.validate_every=2", engine,
        "optim.ema_decay=0.75",
    )  # fmt: skip


@pytest.mark.parametrize("name", long_except({}, [name for name in ZERO_FILES if name not in HIERARCHICAL]))
def test_it_is_the_run_of_ddp_and_resumes_exactly(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, ddp: Path, tmp_path: Path, name: str
) -> None:
    overrides = settings(small_corpus, write_zero_file(tmp_path, name))
    whole = tmp_path / "whole"
    pool(2).run(train_micro, str(small_corpus.train), str(whole), overrides)
    assert_same(whole, ddp)
    half = first_three(whole, tmp_path / "half")
    pool(2).run(train_micro, str(small_corpus.train), str(half), overrides)
    assert_same_bits(half, whole)
