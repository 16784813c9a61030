"""Whatever a run does before it saves, its checkpoints are whole, and it continues from them bit for bit.

Validation leaves an engine in another state than an update; so do recomputation, skipped layers, accumulation and the
measuring of memory. Real runs have all of them, and so have these.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.helpers.audio import SmallCorpus
from tests.helpers.memory import peaks_of_a_state, peaks_of_an_engine
from tests.helpers.pool import Pool
from tests.helpers.tasks import (
    losses_after_an_import,
    read_where_one_rank_cannot,
    replaced_parameters,
    save_what_one_rank_spoils,
    save_where_one_rank_fails,
    train_micro,
    train_until_killed,
    train_with_an_engine_that_drops,
)
from tests.helpers.tiers import long_except
from w2vscale import checkpoint
from w2vscale.checkpoint import sharded_writer
from w2vscale.checkpoint.format import committed, update_of
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.checkpoint.verification import verify
from w2vscale.distributed.process_group import Ranks

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

VARIANTS = {
    "ddp": "name: ddp, activation_checkpointing: full",
    "fsdp": "name: fsdp, activation_checkpointing: full",
    "fsdp_keeping_parameters": "name: fsdp, activation_checkpointing: selective, reshard_after_forward: false",
    "fsdp_hybrid": "name: fsdp, activation_checkpointing: full, shard_size: 1",
    "fsdp_offload": "name: fsdp, activation_checkpointing: selective, offload: true",
    "zero1": "name: deepspeed, activation_checkpointing: full, deepspeed_config: zero1",
    "zero2": "name: deepspeed, activation_checkpointing: selective, deepspeed_config: zero2",
    "zero3": "name: deepspeed, activation_checkpointing: full, deepspeed_config: zero3",
}


def settings(corpus: SmallCorpus, variant: str, *, updates: int) -> tuple[str, ...]:
    """LayerDrop, dropout and clipping are those of tests/helpers/micro.py."""
    return (
        f"engine={{{VARIANTS[variant]}}}",
        f"data.validation={corpus.validation}",
        "batch.concat=2",
        "batch.max_seconds=4",
        "batch.micro_batches=8",
        "trainer.validate_every=2",
        f"trainer.updates={updates}",
        "schedule.warmup_updates=2",
        "checkpoint.every=1",
        "checkpoint.keep_last=99",
    )


def state(path: Path) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of a run's newest checkpoint."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def assert_whole(exp: Path, *, updates: int) -> None:
    """A checkpoint after every update, each of which verifies."""
    paths = sorted(committed(exp / "checkpoints"))
    assert [update_of(path) for path in paths] == list(range(1, updates + 1))
    for path in paths:
        assert verify(path).problems == [], path


def assert_same_bits(found: Path, expected: Path) -> None:
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.mark.parametrize("variant", long_except({"fsdp"}, VARIANTS))
def test_a_killed_run_continues_bit_for_bit(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, variant: str
) -> None:
    overrides = settings(small_corpus, variant, updates=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pool(2).run(train_micro, str(small_corpus.train), str(whole), overrides)
    assert_whole(whole, updates=3)
    with pytest.raises(AssertionError, match="the process died"):
        pool(2).run(train_until_killed, str(small_corpus.train), str(killed), overrides, 2)
    assert len(committed(killed / "checkpoints")) <= 2
    pool(2).run(train_micro, str(small_corpus.train), str(killed), overrides)
    assert_whole(killed, updates=3)
    assert_same_bits(killed, whole)


@pytest.mark.parametrize("variant", long_except({"fsdp", "fsdp_keeping_parameters", "zero1", "zero3"}, VARIANTS))
def test_an_import_after_an_evaluation_is_what_computes(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, variant: str
) -> None:
    """Weights that evaluation has gathered are those of before."""
    arguments = (str(small_corpus.train), ("batch.max_seconds=4", f"engine={{{VARIANTS[variant]}}}"))
    expected, found = (pool(2).run(losses_after_an_import, *arguments, first) for first in (False, True))
    assert found == expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("zero")])
def test_the_model_has_the_parameters_that_the_optimizer_steps(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, variant: str
) -> None:
    """What FSDP2 puts in their place while they are gathered is gone once an engine is done."""
    arguments = (str(small_corpus.train), ("batch.max_seconds=4", f"engine={{{VARIANTS[variant]}}}"))
    assert pool(2).run(replaced_parameters, *arguments) == [[], []]


@pytest.mark.parametrize(("variant", "asynchronous"), [("ddp", "true"), ("fsdp", "false"), ("zero2", "true")])
def test_an_engine_that_drops_a_tensor_on_one_rank_commits_nothing(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, variant: str, asynchronous: str
) -> None:
    overrides = (*settings(small_corpus, variant, updates=4), f"checkpoint.asynchronous={asynchronous}")
    dropped = "optim.encoder.mask_embedding.step"
    errors = pool(2).run(train_with_an_engine_that_drops, dropped, 3, str(small_corpus.train), str(tmp_path), overrides)
    folder = tmp_path / "checkpoints"
    message = (
        f"{folder}/update_00000003: not committed: the state to save does not match the model and its optimizer: "
        f"{dropped}: missing; earlier checkpoints are unchanged"
    )
    assert errors == [message] * 2
    assert (folder / "latest").resolve() == folder / "update_00000002"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "update_00000001", "update_00000002"]
    assert_whole(tmp_path, updates=2)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ("missing", "weight: its slices leave a gap"),
        ("doubled", "weight: its slices overlap"),
        ("rounded", "weight: its slices have different types (bfloat16, float32)"),
    ],
)
def test_what_the_file_of_one_rank_lacks_is_noticed_before_the_commit(
    pool: Callable[[int], Pool], tmp_path: Path, spoilt: str, problem: str, asynchronous: bool
) -> None:
    errors = pool(2).run(save_what_one_rank_spoils, str(tmp_path), spoilt, asynchronous)
    message = f"{tmp_path}/update_00000002: not committed: its files do not hold every expected tensor exactly once"
    assert errors == [f"{message}: model.{problem}; earlier checkpoints are unchanged"] * 2
    assert open_checkpoint(tmp_path).state.update == 1


def test_a_file_that_one_rank_cannot_read_is_the_same_error_on_all(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    errors = pool(2).run(read_where_one_rank_cannot, str(tmp_path))
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"{tmp_path}/update_00000001/shard-0000") and "Input/output error" in errors[0]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("none", ""),
        ("full disk", "a checkpoint cannot be written: [Errno 28] No space left on device"),
        ("not finite", "not committed: model.layer1 holds values that are not finite; there is no earlier checkpoint"),
    ],
)
def test_tensors_are_gathered_by_all_ranks_even_if_one_fails(
    pool: Callable[[int], Pool], tmp_path: Path, failure: str, message: str
) -> None:
    """Some have fewer rows than there are ranks."""
    errors = pool(3).run(save_where_one_rank_fails, str(tmp_path), failure, timeout=60.0)
    assert len(set(errors)) == 1 and errors[0].endswith(message) and "\n" not in errors[0]
    assert bool(committed(tmp_path)) == (errors[0] == "") == (message == "")


def imports_the_writer(folder: str) -> bool:
    """Whether a new store imports what writes the files of several ranks."""
    ranks, name = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size()), sharded_writer.__name__
    with patch.dict(sys.modules), patch.object(checkpoint, "sharded_writer", sharded_writer):
        del sys.modules[name]
        CheckpointStore(Path(folder), ranks, expected={})
        return name in sys.modules


def test_the_first_checkpoint_waits_for_no_import(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Distributed Checkpoint takes a second, and is imported while the run is built."""
    assert pool(2).run(imports_the_writer, str(tmp_path)) == [True, True]


def test_no_rank_makes_a_copy_of_its_share(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """A state is saved, read, and taken from another model part by part."""
    for peaks in pool(2).run(peaks_of_a_state, str(tmp_path)):
        assert all(peak < 0.5 for peak in peaks.values()), peaks


@pytest.mark.parametrize("variant", ["fsdp_offload", "zero3"])
def test_a_checkpoint_makes_one_copy_of_a_share_in_the_background_and_else_none(
    small_corpus: SmallCorpus, tmp_path: Path, variant: str
) -> None:
    """Of the parameters and moments of a rank, 12 bytes per parameter."""
    overrides = (f"engine={{{VARIANTS[variant]}}}",)
    with closing(Pool(2, tmp_path)) as new:
        for peaks in new.run(peaks_of_an_engine, str(small_corpus.train), str(tmp_path), overrides):
            assert peaks[False] < 0.4 and 0.9 < peaks[True] < 1.4, peaks
