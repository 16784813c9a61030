"""What w2vscale.planning says an engine sends is what it sends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers.collectives import Sent, sent_in_an_update
from tests.helpers.pool import Pool
from tests.helpers.tiers import long
from tools.scaling.growth import preset_model
from w2vscale.config import Config, load_config
from w2vscale.planning.traffic import ENGINES, NCCL, Pace, Task, sharding_by, sharding_of, update_of
from w2vscale.planning.work import model_of

pytestmark = pytest.mark.distributed

FORWARDS = 2
QUICK = ("model.layers=2", "regularization.layerdrop=0")
ZERO = {
    "contiguous_gradients": True,
    "reduce_bucket_size": 400_000,
    "allgather_bucket_size": 400_000,
    "stage3_prefetch_bucket_size": 400_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_live_parameters": 2_000_000,
    "stage3_max_reuse_distance": 400_000,
}
"""Sizes that relate to `tiny` as those in ds_configs/ do to `large`."""

NORM = 16
"""Bytes. Norms and flags are smaller; there are several of them with DeepSpeed, and with FSDP2 they are not seen."""


def expected(config: Config, ranks: int) -> list[Sent]:
    """What w2vscale.planning says."""
    model, sharding = model_of("tiny", config), sharding_by(config, ranks)
    tasks = update_of(model, sharding, forwards=FORWARDS, pace=Pace(1.0, 2.0, 0.1), backend=NCCL)
    return [Sent(task.kind, int(task.size)) for task in tasks if task.kind is not None and task.size > NORM]


def totals(sent: Sequence[Sent]) -> dict[str, int]:
    """Bytes by kind."""
    return {kind: sum(one.size for one in sent if one.kind == kind) for kind in sorted({one.kind for one in sent})}


@pytest.fixture
def zero_file(tmp_path: Path) -> Callable[[str], str]:
    """A DeepSpeed configuration of the stage in an engine's name, for a small model."""

    def write(engine: str) -> str:
        stage = int(engine.removeprefix("zero"))
        section = {"stage": stage, "overlap_comm": stage > 1, "reduce_scatter": True, **ZERO}
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": section}))
        return str(tmp_path / "zero.json")

    return write


@pytest.mark.parametrize(
    ("engine", "ranks", "compute", "reduce"),
    [
        ("ddp", 2, "fp32", "fp32"),
        ("ddp", 2, "fp32", "bf16"),
        ("fsdp", 3, "fp32", "fp32"),  # does not divide all first dimensions
        ("fsdp", 2, "bf16", "fp32"),
        long("fsdp", 2, "fp32", "bf16"),
        ("fsdp_keep", 2, "fp32", "fp32"),
        long("hsdp", 4, "fp32", "fp32"),
        long("hsdp", 4, "bf16", "bf16"),
    ],
)
def test_each_collective_of_ddp_and_fsdp(
    pool: Callable[[int], Pool], engine: str, ranks: int, compute: str, reduce: str
) -> None:
    precision = f"precision={{compute: {compute}, reduce: {reduce}}}"
    settings = (*QUICK, precision, f"engine={json.dumps(ENGINES[engine])}")
    if engine == "hsdp":
        settings = (*settings, "engine.shard_size=2")
    config = load_config("tiny", settings)
    every = pool(ranks).run(sent_in_an_update, config, FORWARDS)
    wanted = expected(config, ranks)
    for sent in every:
        assert Counter(one for one in sent if one.size > NORM) == Counter(wanted)
    if engine == "ddp":
        assert [one.size for one in every[0]] == [one.size for one in wanted]  # in the same order


@pytest.mark.parametrize(
    ("engine", "ranks", "compute", "reduce"),
    [
        ("zero1", 2, "bf16", "fp32"),
        ("zero2", 3, "fp32", "fp32"),
        ("zero3", 2, "fp32", "fp32"),
        long("zero2", 2, "bf16", "fp32"),
        long("zero2", 2, "fp32", "bf16"),
        long("zero3", 3, "bf16", "bf16"),
    ],
)
def test_bytes_of_zero(
    pool: Callable[[int], Pool], zero_file: Callable[[str], str], engine: str, ranks: int, compute: str, reduce: str
) -> None:
    """DeepSpeed pads groups of parameters, and cuts them in other places: sums are the same to a few percent."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    file = zero_file(engine)
    precision = f"precision={{compute: {compute}, reduce: {reduce}}}"
    settings = (*QUICK, precision, f"engine={{name: deepspeed, deepspeed_config: {file}}}")
    config = load_config("tiny", settings)
    every = pool(ranks).run(sent_in_an_update, config, FORWARDS)
    wanted = totals(expected(config, ranks))
    for sent in every:
        found = totals([one for one in sent if one.size > NORM])
        assert found == pytest.approx(wanted, rel=0.03)


def test_tasks_wait_for_earlier_ones_only() -> None:
    model = preset_model("tiny", QUICK)
    for engine in ENGINES:
        tasks: list[Task] = update_of(
            model, sharding_of(engine, model, 8, per_node=4), forwards=3, pace=Pace(1.0, 2.0, 0.1), backend=NCCL
        )
        assert all(place < number for number, task in enumerate(tasks) for place in task.after)
        computing = sum(task.seconds for task in tasks)
        assert 9.0 < computing <= 9.1 + 1e-9, engine  # three forwards and backwards, and a share of the step
