"""Buffers, frozen parameters and an EMA teacher mean on every engine what they mean in PyTorch, with two processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.semantics import (
    DECAY,
    Extras,
    Updates,
    WithExtras,
    WithTeacher,
    refusal_of_a_teacher,
    resumed_with,
    updates_with,
)
from tests.helpers.tiers import long, long_except
from tools.bench.engine_parity import ENGINES

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

VARIANTS = {
    **{name: (setting,) for name, setting in ENGINES.items()},
    "fsdp_keeping_parameters": ("engine={name: fsdp, reshard_after_forward: false}",),
    "fsdp_offload": ("engine={name: fsdp, offload: true}",),
    "fsdp_hybrid": ("engine={name: fsdp, shard_size: 1}",),
    "zero2_offload": ("engine={name: deepspeed, deepspeed_config: zero2_offload}",),
    "zero3_offload": ("engine={name: deepspeed, deepspeed_config: zero3_offload}",),
}
BF16 = {f"{name}_bf16": (*VARIANTS[name], "precision.compute=bf16") for name in ENGINES}
QUICK = {"ddp", "fsdp"}
EVERY = long_except(QUICK, [*VARIANTS, *BF16])
OF_A_TEACHER = long_except({"ddp", "fsdp"}, ["ddp", "fsdp", "fsdp_keeping_parameters", "fsdp_offload"])
STATISTICS = ("extras.norm.running_mean", "extras.norm.running_var", "extras.norm.num_batches_tracked")
CONSTANT = ("extras.scale", "extras.order", "extras.offset")
FROZEN = "extras.frozen"


class Found(NamedTuple):
    """What two ranks saw in five updates, and the checkpoint after the third."""

    of_ranks: list[Updates]
    checkpoint: Path


Train = Callable[[str], Found]


@pytest.fixture(scope="module")
def train(pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Five updates with an engine, done once."""
    done: dict[str, Found] = {}

    def get(variant: str) -> Found:
        if variant not in done:
            folder = tmp_path_factory.mktemp(variant)
            overrides = (VARIANTS | BF16)[variant]
            of_ranks = pool(2).run(updates_with, WithExtras, str(small_corpus.train), overrides, 5, str(folder))
            done[variant] = Found([*map(Updates.unpacked, of_ranks)], folder)
        return done[variant]

    return get


@pytest.fixture(scope="module")
def teach(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> Callable[[str], list[Updates]]:
    """What two ranks saw in three updates with a teacher, done once."""

    @cache
    def get(variant: str) -> list[Updates]:
        arguments = (WithTeacher, str(small_corpus.train), (VARIANTS | BF16)[variant], 3)
        return [*map(Updates.unpacked, pool(2).run(updates_with, *arguments))]

    return get


def initial_buffers() -> dict[str, Tensor]:
    """The buffers of the helper's module as PyTorch makes them."""
    return {f"extras.{name}": buffer for name, buffer in Extras(16).named_buffers()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("variant", EVERY)
def test_buffers_are_initialised_and_equal_on_all_ranks(train: Train, variant: str) -> None:
    one, other = train(variant).of_ranks
    expected = initial_buffers()
    for mine, theirs in zip(one.buffers, other.buffers, strict=True):
        assert_identical(theirs, mine)
    assert_identical(one.buffers[0], expected)
    for earlier, later in zip(one.buffers, one.buffers[1:], strict=False):
        assert_identical({name: later[name] for name in CONSTANT}, {name: expected[name] for name in CONSTANT})
        assert not any(torch.equal(earlier[name], later[name]) for name in STATISTICS)
    assert int(one.buffers[-1]["extras.norm.num_batches_tracked"]) == 5 * 2  # two micro-batches per rank and update


@pytest.mark.parametrize("variant", EVERY)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(train: Train, variant: str) -> None:
    one, other = train(variant).of_ranks
    first, *later = one.states
    assert first[f"model.{FROZEN}"].dtype == torch.float32
    # Values that do not survive a cast to bf16.
    assert not torch.equal(first[f"model.{FROZEN}"].bfloat16().float(), first[f"model.{FROZEN}"])
    for state in (*later, *other.states):
        assert torch.equal(state[f"model.{FROZEN}"], first[f"model.{FROZEN}"])
        assert not any(name.startswith(f"optim.{FROZEN}") for name in state)
    trained = "extras.norm.weight"
    assert f"optim.{trained}.exp_avg" in first
    assert not torch.equal(later[-1][f"model.{trained}"], first[f"model.{trained}"])


@pytest.mark.parametrize("variant", EVERY)
def test_buffers_are_exported(train: Train, variant: str) -> None:
    one, _ = train(variant).of_ranks
    for state, buffers in zip(one.states, one.buffers, strict=True):
        persistent = {name: buffer for name, buffer in buffers.items() if name != "extras.offset"}
        assert_identical({name: state[f"model.{name}"] for name in persistent}, persistent)
        assert "model.extras.offset" not in state


@pytest.mark.parametrize("variant", long_except(QUICK, [name for name in VARIANTS if name != "ddp"]))
def test_every_engine_learns_the_same(train: Train, variant: str) -> None:
    found, expected = train(variant).of_ranks[0], train("ddp").of_ranks[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_close(found.states[-1], expected.states[-1])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference, norm = float((found[name] - tensor).double().norm()), float(tensor.double().norm())
        # Key biases of the attention have gradients of rounding noise: they move by the size of the noise.
        assert difference <= 1e-5 * norm + 1e-7 * tensor.numel() ** 0.5, name


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("ddp", "fsdp"), ("zero2", "ddp"), long("fsdp", "zero3"), long("zero3", "ddp"),
        long("fsdp", "zero1"), long("zero1", "zero2"), long("zero2", "zero3"),
        long("zero3", "zero1"), long("fsdp", "ddp"), long("zero1", "fsdp"),
        long("fsdp_offload", "zero3_offload"), long("zero2_offload", "fsdp_hybrid"),
    ],
)  # fmt: skip
def test_another_engine_continues_the_checkpoint(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, train: Train, writer: str, reader: str
) -> None:
    written = train(writer)
    arguments = (WithExtras, str(small_corpus.train), VARIANTS[reader], str(written.checkpoint), 5)
    for before, packed in zip(written.of_ranks, pool(2).run(resumed_with, *arguments), strict=True):
        resumed = Updates.unpacked(packed)
        assert_identical(resumed.states[0], before.states[3])
        assert_identical(resumed.buffers[0], before.buffers[3])
        assert resumed.losses == pytest.approx(before.losses[3:], rel=1e-5)
        assert_close(resumed.states[-1], before.states[-1])


@pytest.mark.parametrize("variant", [*OF_A_TEACHER, "ddp_bf16", "fsdp_bf16"])
def test_a_teacher_is_the_moving_average_of_the_student(teach: Callable[[str], list[Updates]], variant: str) -> None:
    for found in teach(variant):
        names = [name.removeprefix("model.teacher.") for name in found.states[0] if name.startswith("model.teacher.")]
        assert len(names) > 20
        for name in names:
            expected = found.states[0][f"model.teacher.{name}"].double()
            for state in found.states[1:]:
                expected = DECAY * expected + (1.0 - DECAY) * state[f"model.encoder.{name}"].double()
                teacher = state[f"model.teacher.{name}"]
                assert teacher.dtype == torch.float32
                assert float((teacher - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name
                assert f"optim.teacher.{name}.exp_avg" not in state
        moved = "model.teacher.feature_projection.weight"
        assert not torch.equal(found.states[0][moved], found.states[-1][moved])


@pytest.mark.parametrize("variant", OF_A_TEACHER[1:])
def test_engines_learn_the_same_from_a_teacher(teach: Callable[[str], list[Updates]], variant: str) -> None:
    assert teach(variant)[0].losses == pytest.approx(teach("ddp")[0].losses, rel=1e-5)


def test_a_teacher_has_the_precision_of_the_student(teach: Callable[[str], list[Updates]]) -> None:
    """Under FSDP2 too, its feature encoder and positional convolution have fp32 weights."""
    found, expected = teach("fsdp_bf16")[0].losses, teach("ddp_bf16")[0].losses
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("variant", ["zero1", "zero2", "zero3"])
def test_deepspeed_refuses_a_teacher_in_one_line(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, variant: str
) -> None:
    messages = pool(2).run(refusal_of_a_teacher, str(small_corpus.train), VARIANTS[variant])
    assert messages[0] == messages[1]
    assert messages[0].startswith("engine.name=deepspeed: ") and "choose engine.name=ddp or fsdp" in messages[0]
    assert "\n" not in messages[0]
