"""Hierarchical sharding on two times two processes: FSDP2 with copies of the model, and ZeRO-3 with hpZ."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.six_updates import SIX, assert_same, assert_same_bits, assert_similar, first_three
from tests.helpers.tasks import (
    all_reduces_over_replicas,
    groups_of_gathers,
    losses_after_an_import,
    on_nodes_of_two,
    refusal_of_an_engine,
    replaced_parameters,
    step_after_a_gradient_that_is_not_finite,
    train_micro,
)
from tests.helpers.tiers import long, long_except
from tests.helpers.zero_files import ZERO_FILES, write_zero_file

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

ENGINES = {
    "ddp": "engine={name: ddp}",
    "fsdp": "engine={name: fsdp}",
    "hybrid": "engine={name: fsdp, shard_size: 2}",
    "hybrid_keeping_parameters": "engine={name: fsdp, shard_size: 2, reshard_after_forward: false}",
    "hybrid_offload": "engine={name: fsdp, shard_size: 2, offload: true}",
    "hybrid_of_one": "engine={name: fsdp, shard_size: 1}",
    "hybrid_recomputing": "engine={name: fsdp, shard_size: 2, activation_checkpointing: full}",
}
HPZ = [name for name in ZERO_FILES if name.startswith("hpz")]
ZERO = ["zero3_partitioned", *HPZ]
HYBRID = [name for name in ENGINES if name.startswith("hybrid")]

Settings = Callable[[str], str]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The setting that chooses an engine."""
    folder = tmp_path_factory.mktemp("zero")
    return lambda name: ENGINES[name] if name in ENGINES else write_zero_file(folder, name)


@pytest.fixture(scope="module")
def train(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, setting: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """The folder of a run of six updates of three forwards, trained once.

    The averaged weights are validated after every second update. With `into`, another run is continued there.
    """
    folder = tmp_path_factory.mktemp("hierarchical")

    def run(name: str, compute: str = "fp32", *, into: Path | None = None, processes: int = 4) -> Path:
        exp = into or folder / f"{name}-{compute}"
        if into is not None or not exp.exists():
            overrides = (
                *SIX, setting(name), f"precision.compute={compute}", "batch.micro_batches=12",
                f"data.validation={small_corpus.validation}", "trainer.validate_every=2", "optim.ema_decay=0.75",
            )  # fmt: skip
            if compute == "bf16":
                overrides += ("optim.lr=3e-4", "data.max_seconds=2", "batch.max_seconds=10")
            pool(processes).run(train_micro, str(small_corpus.train), str(exp), overrides)
        return exp

    return run


@pytest.mark.parametrize("name", long_except({"hybrid"}, [*HYBRID, *ZERO]))
def test_it_learns_like_ddp(train: Train, name: str) -> None:
    assert_same(train(name), train("ddp"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["hybrid", "hybrid_keeping_parameters", "hpz"])
def test_bf16(train: Train, name: str) -> None:
    assert_similar(train(name, "bf16"), train("ddp", "bf16"))


@pytest.mark.long
def test_hpz_is_zero3_to_the_bit_in_bf16(train: Train) -> None:
    assert_same_bits(train("hpz", "bf16"), train("zero3_partitioned", "bf16"))


@pytest.mark.parametrize(
    ("writer", "reader", "processes"),
    [
        ("ddp", "hybrid", 4),
        long("hybrid", "hpz", 4), long("hpz", "hybrid_of_one", 4),
        long("hybrid_of_one", "hybrid_keeping_parameters", 4),
        long("hybrid", "fsdp", 2), long("hpz", "fsdp", 2),
    ],
)  # fmt: skip
def test_checkpoints_move(train: Train, tmp_path: Path, writer: str, reader: str, processes: int) -> None:
    whole = train(writer)
    assert_same(train(reader, into=first_three(whole, tmp_path / "exp"), processes=processes), whole)


@pytest.mark.long
@pytest.mark.parametrize("name", ["hybrid", "hybrid_keeping_parameters", "hpz"])
def test_resuming_is_exact(train: Train, tmp_path: Path, name: str) -> None:
    whole = train(name)
    assert_same_bits(train(name, into=first_three(whole, tmp_path / "exp")), whole)


@pytest.mark.parametrize("reshard", ["true", "false"])
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_replicas_are_reduced_once_per_unit_and_update(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, reshard: str, reduce: str
) -> None:
    engine = f"engine={{name: fsdp, shard_size: 2, reshard_after_forward: {reshard}}}"
    settings = (engine, f"precision.reduce={reduce}", "regularization.layerdrop=0")
    for units, reductions in pool(4).run(all_reduces_over_replicas, str(small_corpus.train), settings):
        assert units == 6 and reductions == [units, units]


@pytest.mark.parametrize("name", long_except({"hybrid"}, ["hybrid", "hybrid_offload", "hpz"]))
def test_a_gradient_that_is_not_finite_changes_nothing(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, setting: Settings, name: str
) -> None:
    settings = (setting(name), "regularization.layerdrop=0", "precision.compute=fp32")
    for skipped, unchanged, norms in pool(4).run(
        step_after_a_gradient_that_is_not_finite, str(small_corpus.train), settings
    ):
        assert skipped and unchanged
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("name", long_except({}, ["hybrid", "hpz", "hpz_persistent"]))
def test_an_import_after_an_evaluation_is_what_computes(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, setting: Settings, name: str
) -> None:
    """Not the second copy that hpZ has kept of the parameters, those that are frozen among them."""
    arguments = (str(small_corpus.train), ("batch.max_seconds=4", setting(name)))
    for frozen in ([], ["feature_projection", "blocks.1"]):
        expected, found = (pool(4).run(losses_after_an_import, *arguments, first, frozen) for first in (False, True))
        assert found == expected


@pytest.mark.long
@pytest.mark.parametrize("name", ["hybrid", "hybrid_keeping_parameters"])
def test_the_model_has_the_parameters_that_the_optimizer_steps(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, name: str
) -> None:
    for reduce in ("fp32", "bf16"):
        settings = ("batch.max_seconds=4", ENGINES[name], f"precision.reduce={reduce}")
        assert pool(4).run(replaced_parameters, str(small_corpus.train), settings) == [[]] * 4


def test_hpz_gathers_within_a_machine_after_the_first_time(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, setting: Settings
) -> None:
    """The forward gathers over all processes what the step has changed, and the backward over two."""
    settings = (setting("hpz"), "regularization.layerdrop=0")
    for forward, backward in pool(4).run(groups_of_gathers, str(small_corpus.train), settings):
        assert set(forward) == {4} and set(backward) == {2}
        assert len(backward) > 10


class TestNodes:
    """`engine.shard_size=node`, where each machine has two processes."""

    def test_it_shards_within_a_machine(self, pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> None:
        settings = ("engine={name: fsdp, shard_size: node}", "regularization.layerdrop=0")
        arguments = (all_reduces_over_replicas, str(small_corpus.train), settings)
        for units, reductions in pool(4).run(on_nodes_of_two, "block", *arguments):
            assert units == 6 and reductions == [units, units]

    def test_ranks_that_are_dealt_out_to_machines_in_turn_are_refused(
        self, pool: Callable[[int], Pool], small_corpus: SmallCorpus
    ) -> None:
        settings = ("engine={name: fsdp, shard_size: node}",)
        arguments = (refusal_of_an_engine, str(small_corpus.train), settings)
        for message in pool(4).run(on_nodes_of_two, "cyclic", *arguments):
            assert message.startswith("engine.shard_size=node: rank 1 is process 0 of ")
            assert message.endswith("must be consecutive (srun --distribution=block)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("engine={name: fsdp, shard_size: 3}", "engine.shard_size=3 does not divide the number of processes (4)"),
        ("hpz", "zero_optimization.zero_hpz_partition_size=3 does not divide 4 processes; set it to"),
    ],
)
def test_a_size_that_does_not_divide_the_processes_is_one_line(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, setting: Settings, tmp_path: Path, name: str, message: str
) -> None:
    if name == "hpz":
        path = tmp_path / "hpz.json"
        path.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}')
        name = f"engine={{name: deepspeed, deepspeed_config: {path}}}"
    for found in pool(4).run(refusal_of_an_engine, str(small_corpus.train), (name,)):
        assert message in found and "\n" not in found
