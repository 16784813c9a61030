"""`precision.reduce=bf16`: gradients are rounded where they are sent, and nowhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.six_updates import SIX, assert_same_bits, figures, first_three
from tests.helpers.tasks import (
    gradients_of_windows,
    sent_in_a_window,
    step_after_a_gradient_that_is_not_finite,
    train_micro,
)
from tests.helpers.tiers import long, long_except
from tools.bench.engine_parity import ENGINES

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

VARIANTS = {
    **ENGINES,
    "fsdp_keeping_parameters": "engine={name: fsdp, reshard_after_forward: false}",
    "fsdp_offload": "engine={name: fsdp, offload: true}",
    "zero2_offload": "engine={name: deepspeed, deepspeed_config: zero2_offload}",
    "zero3_offload": "engine={name: deepspeed, deepspeed_config: zero3_offload}",
}
HYBRID = {
    "hybrid": "engine={name: fsdp, shard_size: 2}",
    "hybrid_keeping_parameters": "engine={name: fsdp, shard_size: 2, reshard_after_forward: false}",
    "hybrid_of_one": "engine={name: fsdp, shard_size: 1}",
    "ddp": ENGINES["ddp"],
}
BF16 = "precision.reduce=bf16"
WINDOWS = (1, 2, 16)  # forwards

Gradients = Callable[[int, str, str], list[torch.Tensor]]


@pytest.fixture(scope="module")
def gradients(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> Gradients:
    """The gradients of windows of equal micro-batches, by (processes, engine, precision.reduce), computed once."""
    done: dict[tuple[int, str, str], list[torch.Tensor]] = {}

    def get(processes: int, engine: str, reduce: str) -> list[torch.Tensor]:
        key = (processes, engine, reduce)
        if key not in done:
            settings = (engine, f"precision.reduce={reduce}", "regularization.layerdrop=0", "regularization.dropout=0")
            done[key] = pool(processes).run(gradients_of_windows, str(small_corpus.train), settings, WINDOWS)[0]
        return done[key]

    return get


def assert_rounded_once(found: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """The error of sums of bf16 numbers, whose unit roundoff is 2^-9, whatever the number of forwards.

    Accumulated in bf16, sixteen equal gradients would be wrong by more than twice as much as one.
    """
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
    assert 1e-3 < errors[0] < 4e-3
    assert errors == pytest.approx([errors[0]] * len(errors), rel=0.1)


@pytest.mark.parametrize("name", long_except({"ddp", "fsdp", "zero2"}, VARIANTS))
def test_only_what_is_sent_is_rounded(gradients: Gradients, name: str) -> None:
    assert_rounded_once(gradients(2, VARIANTS[name], "bf16"), gradients(2, ENGINES["ddp"], "fp32"))


@pytest.mark.parametrize("name", long_except({}, HYBRID))
def test_both_sums_of_hybrid_sharding_are_rounded(gradients: Gradients, name: str) -> None:
    assert_rounded_once(gradients(4, HYBRID[name], "bf16"), gradients(4, ENGINES["ddp"], "fp32"))


@pytest.mark.parametrize("name", long_except({"ddp", "fsdp"}, VARIANTS))
def test_a_gradient_takes_half_of_the_bytes(pool: Callable[[int], Pool], small_corpus: SmallCorpus, name: str) -> None:
    counts = []
    for reduce in ("fp32", "bf16"):
        settings = (VARIANTS[name], f"precision.reduce={reduce}", "regularization.layerdrop=0")
        counts.append(pool(2).run(sent_in_a_window, str(small_corpus.train), settings)[0])
    (whole, gathered), (half, still_gathered) = counts
    assert whole > 100_000 and half == pytest.approx(whole / 2, rel=1e-3)
    assert still_gathered == gathered


@pytest.mark.parametrize("name", long_except({"ddp"}, ENGINES))
def test_one_process_rounds_nothing(pool: Callable[[int], Pool], small_corpus: SmallCorpus, name: str) -> None:
    found, expected = (
        pool(1).run(gradients_of_windows, str(small_corpus.train), (ENGINES[name], f"precision.reduce={reduce}"), (2,))
        for reduce in ("bf16", "fp32")
    )
    assert torch.equal(found[0][0], expected[0][0])


@pytest.mark.parametrize("name", long_except({"ddp", "fsdp"}, VARIANTS))
def test_a_gradient_that_is_not_finite_changes_nothing(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, name: str
) -> None:
    settings = (VARIANTS[name], BF16, "regularization.layerdrop=0")
    for skipped, unchanged, norms in pool(2).run(
        step_after_a_gradient_that_is_not_finite, str(small_corpus.train), settings
    ):
        assert skipped and unchanged
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize(
    ("processes", "name"), [(2, "ddp"), long(2, "fsdp"), long(2, "zero1"), long(2, "zero3"), long(4, "hybrid")]
)
def test_a_run_that_skips_layers_stays_close(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory,
    processes: int, name: str,
) -> None:  # fmt: skip
    """With LayerDrop, three forwards per window and clipping."""
    common = (f"batch.micro_batches={3 * processes}", "batch.max_seconds=4", "trainer.updates=4")
    losses = []
    for settings in ((VARIANTS | HYBRID)[name], BF16), (ENGINES["ddp"], "precision.reduce=fp32"):
        exp = str(tmp_path_factory.mktemp(name))
        losses.append(pool(processes).run(train_micro, str(small_corpus.train), exp, (*common, *settings))[0])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    ("processes", "name"),
    [long(4, "hybrid"), long(2, "ddp"), long(2, "fsdp"), long(2, "zero2"), long(2, "zero3_offload")],
)
def test_resuming_is_exact(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, processes: int, name: str
) -> None:
    """Three updates, and three more: the run of six. DDP continues the same checkpoint."""

    def train(exp: Path, engine: str) -> Path:
        overrides = (*SIX, f"batch.micro_batches={3 * processes}", engine, BF16)
        pool(processes).run(train_micro, str(small_corpus.train), str(exp), overrides)
        return exp

    engine = (VARIANTS | HYBRID)[name]
    whole = train(tmp_path / "whole", engine)
    assert_same_bits(train(first_three(whole, tmp_path / "half"), engine), whole)
    other = train(first_three(whole, tmp_path / "other"), ENGINES["ddp"])
    assert figures(other)[3][0] == pytest.approx(figures(whole)[3][0], rel=1e-5)
