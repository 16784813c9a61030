"""Every engine learns the same, and continues what any other engine began on any number of processes."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.six_updates import ODD_MODEL, SIX, assert_same, assert_similar, first_three, state
from tests.helpers.tasks import (
    order_of_reduction,
    step_after_a_gradient_that_is_not_finite,
    train_and_save_first,
    train_micro,
    update_without_a_launcher,
)
from tests.helpers.tiers import long, long_except
from tools.bench.engine_parity import ENGINES

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

VARIANTS = {
    **{name: (setting,) for name, setting in ENGINES.items()},
    "fsdp_keeping_parameters": ("engine={name: fsdp, reshard_after_forward: false}",),
    "fsdp_hybrid": ("engine={name: fsdp, shard_size: 1}",),
    "fsdp_offload": ("engine={name: fsdp, offload: true}",),
    "zero2_offload": ("engine={name: deepspeed, deepspeed_config: zero2_offload}",),
    "zero3_offload": ("engine={name: deepspeed, deepspeed_config: zero3_offload}",),
    "ddp_recomputing": ("engine={name: ddp, activation_checkpointing: full}",),
    "fsdp_recomputing": ("engine={name: fsdp, activation_checkpointing: selective}",),
    "zero2_recomputing": ("engine={name: deepspeed, deepspeed_config: zero2, activation_checkpointing: full}",),
    "zero3_recomputing": ("engine={name: deepspeed, deepspeed_config: zero3, activation_checkpointing: full}",),
}
VARIANTS |= {
    f"{name}_bf16": (
        setting,
        "precision.compute=bf16",
        "optim.lr=3e-4",
        "data.max_seconds=2",
        "batch.max_seconds=20",
    )
    for name, setting in ENGINES.items()
}

Train = Callable[[str, int, int], Path]


@pytest.fixture(scope="module")
def six_updates(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """The folder of a run of six updates by (variant, processes, micro-batches per update), trained once."""
    folder = tmp_path_factory.mktemp("engines")

    def train(variant: str, processes: int, micro_batches: int) -> Path:
        exp = folder / f"{variant}-{processes}-{micro_batches}"
        if not exp.exists():
            overrides = (*SIX, f"batch.micro_batches={micro_batches}", *VARIANTS[variant])
            pool(processes).run(train_micro, str(small_corpus.train), str(exp), overrides)
        return exp

    return train


Continue = Callable[[Path, str, int, int], Path]


@pytest.fixture
def continued(pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path) -> Continue:
    """The folder of a run that continues another one after three of its six updates."""

    def train(whole: Path, variant: str, processes: int, micro_batches: int) -> Path:
        exp = first_three(whole, tmp_path / "exp")
        overrides = (*SIX, f"batch.micro_batches={micro_batches}", *VARIANTS[variant])
        pool(processes).run(train_micro, str(small_corpus.train), str(exp), overrides)
        return exp

    return train


@pytest.mark.parametrize(
    "variant",
    long_except(
        {*ENGINES, "fsdp_keeping_parameters", "fsdp_hybrid"},
        [name for name in VARIANTS if name != "ddp" and not name.endswith("bf16")],
    ),
)
def test_one_micro_batch_per_process(six_updates: Train, variant: str) -> None:
    assert_same(six_updates(variant, 2, 2), six_updates("ddp", 2, 2))


@pytest.mark.parametrize(
    ("processes", "variant"),
    [(2, "fsdp"), (2, "zero2"), (2, "zero3")]
    + [long(2, name) for name in ("fsdp_keeping_parameters", "zero1")]
    + [long(3, name) for name in ("fsdp", "zero3")],
)
def test_accumulation(six_updates: Train, variant: str, processes: int) -> None:
    """Three and two micro-batches per process."""
    assert_same(six_updates(variant, processes, 6), six_updates("ddp", processes, 6))


@pytest.mark.parametrize(
    ("before", "after", "engine"),
    [(2, 1, engine) for engine in ENGINES]
    + [(2, 3, engine) for engine in ("ddp", "fsdp", "zero3")]
    + [long(*processes) for processes in ((2, 3, "zero1"), (2, 3, "zero2"), (1, 2, "fsdp"), (1, 2, "zero3"))],
)
def test_resuming(six_updates: Train, continued: Continue, engine: str, before: int, after: int) -> None:
    """Three updates, and three more on another number of processes: the run of six."""
    whole = six_updates(engine, before, 6)
    assert_same(continued(whole, engine, after, 6), whole)


@pytest.mark.long
def test_each_engine_continues_the_one_before(
    pool: Callable[[int], Pool], six_updates: Train, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    """An update on each and two on the last, on changing numbers of processes: the run of six on one engine."""
    order = [("zero3", 2), ("ddp", 1), ("zero2", 3), ("fsdp", 2), ("zero1", 1)]
    for number, (engine, processes) in enumerate(order, start=1):
        # The learning rate must fall as in the run of six, so the run is stopped by what is left to save.
        overrides = (*SIX, "batch.micro_batches=6", "checkpoint.every=1", "checkpoint.keep_last=6", ENGINES[engine])
        pool(processes).run(train_micro, str(small_corpus.train), str(tmp_path), overrides)
        for later in range(number + 1, 7 if number < len(order) else 0):
            shutil.rmtree(tmp_path / "checkpoints" / f"update_{later:08d}")
    assert_same(tmp_path, six_updates("ddp", 2, 6))


@pytest.mark.parametrize("engine", ["ddp", long("fsdp"), long("zero2"), "zero3"])
def test_resuming_before_every_layer_was_used(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, engine: str
) -> None:
    """With LayerDrop so high that a layer has had no gradient yet; at update 0 none has."""
    overrides = (
        *ODD_MODEL, ENGINES[engine], "regularization.layerdrop=0.9", "trainer.updates=4", "batch.micro_batches=2",
        "batch.max_seconds=5", "schedule.warmup_updates=2", "checkpoint.every=2", "checkpoint.keep_last=9",
    )  # fmt: skip
    whole = pool(2).run(train_and_save_first, str(small_corpus.train), str(tmp_path), overrides)[0]
    for update in (2, 0):
        for later in range(update + 2, 6, 2):
            shutil.rmtree(tmp_path / "checkpoints" / f"update_{later:08d}")
        moments = state(tmp_path)
        unused = [name for name, tensor in moments.items() if name.endswith("out.weight.exp_avg") and not tensor.any()]
        assert unused
        continued = pool(2).run(train_micro, str(small_corpus.train), str(tmp_path), overrides)[0]
        assert continued == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("engine", ["fsdp", long("zero1"), long("zero2"), "zero3"])
def test_bf16(six_updates: Train, engine: str) -> None:
    """One micro-batch per process, large enough that one code weighs little: what is rounded at another place (ZeRO's
    working weights) or added up in another order can flip one."""
    found, expected = six_updates(f"{engine}_bf16", 2, 2), six_updates("ddp_bf16", 2, 2)
    assert_similar(found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_update_of_a_process_may_skip_a_layer(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, precision: str
) -> None:
    """FSDP2 that reduces in the last backward alone asks every unit for its gathered gradient."""
    settings = (*SIX, f"precision.compute={precision}", "regularization.layerdrop=0.9", "trainer.updates=2")
    settings += ("batch.micro_batches=4", "schedule.warmup_updates=1")
    ddp, fsdp = (
        pool(2).run(train_micro, str(small_corpus.train), str(tmp_path / name), (*settings, *VARIANTS[name]))
        for name in ("ddp", "fsdp_keeping_parameters")
    )
    assert fsdp[0] == pytest.approx(ddp[0], rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", long("bf16")])
@pytest.mark.parametrize("name", [*ENGINES, *map(long, ("fsdp_offload", "zero2_offload", "zero3_offload"))])
def test_a_gradient_that_is_not_finite_changes_nothing(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, name: str, precision: str
) -> None:
    settings = (
        *VARIANTS[name], "regularization.layerdrop=0", f"precision.compute={precision}", "optim.ema_decay=0.5",
    )  # fmt: skip
    (skipped, unchanged, norms), _ = pool(2).run(
        step_after_a_gradient_that_is_not_finite, str(small_corpus.train), settings
    )
    assert skipped and unchanged
    assert 0 < norms[0] < math.inf and norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_ddp_reduces_from_the_last_layer_to_the_first(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> None:
    """Whichever layers the first updates skip: the backward and the reduction overlap."""
    settings = (ENGINES["ddp"], "regularization.layerdrop=0.9")
    (names, orders), _ = pool(2).run(order_of_reduction, str(small_corpus.train), settings)
    assert orders == [names[::-1]] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_nobody_launched(pool: Callable[[int], Pool], small_corpus: SmallCorpus, engine: str) -> None:
    """DeepSpeed reads variables that torchrun sets, also in each forward."""
    assert pool(1).run(update_without_a_launcher, str(small_corpus.train), (ENGINES[engine],)) == [True]
