"""The moving average of the weights (`optim.ema_decay`): its formula on every engine, and resumes on other engines."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_engines import VARIANTS
from tests.helpers.audio import SmallCorpus
from tests.helpers.average import Exchange, exchange
from tests.helpers.pool import Pool
from tests.helpers.semantics import Updates, WithExtras, updates_with
from tests.helpers.six_updates import SIX, assert_same, assert_same_bits, first_three, state
from tests.helpers.tasks import train_micro
from tests.helpers.tiers import long, long_except

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

DECAY = 0.75
AVERAGE = f"optim.ema_decay={DECAY}"
QUICK = {"ddp", "fsdp", "zero2", "zero3"}
OTHERS = ("fsdp_hybrid", "fsdp_offload", "zero2_offload", "zero3_offload", "fsdp_bf16", "zero1_bf16", "zero3_bf16")
EVERY = long_except(QUICK, ["ddp", "fsdp", "zero1", "zero2", "zero3", *OTHERS])
Runs = Callable[[str], Path]


@pytest.mark.parametrize("variant", EVERY)
def test_the_average_is_that_of_float64(pool: Callable[[int], Pool], small_corpus: SmallCorpus, variant: str) -> None:
    """The model has a frozen parameter and buffers, which have no average."""
    settings = (*VARIANTS[variant], AVERAGE)
    packed = pool(2).run(updates_with, WithExtras, str(small_corpus.train), settings, 3)[0]
    first, *others = Updates.unpacked(packed).states
    trained = [name.removeprefix("optim.").removesuffix(".step") for name in first if name.endswith(".step")]
    assert [name for name in first if name.startswith("ema.")] == [f"ema.{name}" for name in trained]
    assert "extras.frozen" not in trained and len(others) == 3
    expected = {name: first[f"model.{name}"].double() for name in trained}
    assert all(first[f"ema.{name}"].equal(value.float()) for name, value in expected.items())
    for found in others:
        for name in trained:
            expected[name] = DECAY * expected[name] + (1.0 - DECAY) * found[f"model.{name}"].double()
            error = float((found[f"ema.{name}"].double() - expected[name]).norm())
            assert error <= 2e-7 * float(expected[name].norm()) + 1e-12, name
    assert float((found["ema.quantizer.codevectors"] - found["model.quantizer.codevectors"]).norm()) > 1e-3


@pytest.mark.parametrize("variant", EVERY)
def test_an_evaluation_of_the_average_leaves_the_weights_alone(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, variant: str
) -> None:
    found: Exchange = pool(2).run(exchange, str(small_corpus.train), (*VARIANTS[variant], AVERAGE))[0]
    assert found.unchanged and found.interrupted
    assert found.after == found.before != found.averaged == found.imported


@pytest.fixture(scope="module")
def six_updates(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """The folder of a run of six updates on two processes, by variant, trained once."""
    folder = tmp_path_factory.mktemp("averages")

    def train(variant: str) -> Path:
        if not (exp := folder / variant).exists():
            pool(2).run(train_micro, str(small_corpus.train), str(exp), (*SIX, *VARIANTS[variant], AVERAGE))
        return exp

    return train


@pytest.mark.parametrize("variant", ["ddp", "fsdp", *map(long, ("zero1", "zero2", "zero3"))])
def test_resuming_on_the_same_engine_changes_no_bit(
    pool: Callable[[int], Pool], six_updates: Runs, small_corpus: SmallCorpus, tmp_path: Path, variant: str
) -> None:
    exp = first_three(six_updates(variant), tmp_path / "exp")
    pool(2).run(train_micro, str(small_corpus.train), str(exp), (*SIX, *VARIANTS[variant], AVERAGE))
    assert any(name.startswith("ema.") for name in state(exp))
    assert_same_bits(exp, six_updates(variant))


def test_engines_that_continue_each_other_keep_one_average(
    pool: Callable[[int], Pool], six_updates: Runs, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    """An update on each, the last two on DDP: the run of six on DDP."""
    every = (*SIX, AVERAGE, "checkpoint.every=1", "checkpoint.keep_last=6")
    for number, variant in enumerate(("ddp", "fsdp", "zero2", "zero3", "ddp"), start=1):
        pool(2).run(train_micro, str(small_corpus.train), str(tmp_path), (*every, *VARIANTS[variant]))
        # The learning rate must fall as in the run of six, so the run is stopped by what is left to save.
        for later in range(number + 1, 7 if number < 5 else 0):
            shutil.rmtree(tmp_path / "checkpoints" / f"update_{later:08d}")
    found = state(tmp_path)
    assert not found["ema.quantizer.codevectors"].equal(found["model.quantizer.codevectors"])
    assert_same(tmp_path, six_updates("ddp"))
