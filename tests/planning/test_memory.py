"""Memory of engines: bytes per parameter as the ZeRO paper has them, small cases by hand, and what an H100 needed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tools.bench.contenders import work_settings
from tools.scaling.growth import MEASURED
from w2vscale.config import load_config
from w2vscale.planning.fitting import per_forward, usable
from w2vscale.planning.footprint import Demand
from w2vscale.planning.memory import demand
from w2vscale.planning.state import state_of
from w2vscale.planning.timeline import Affine, Timeline
from w2vscale.planning.traffic import Sharding, sharding_by, sharding_of
from w2vscale.planning.work import Model, Unit, model_of


def with_precision(model: Model, compute: str) -> Model:
    precision = model.config.precision.model_copy(update={"compute": compute})
    return replace(model, config=model.config.model_copy(update={"precision": precision}))


@pytest.mark.parametrize(
    ("engine", "compute", "working", "masters", "gradients", "moments"),
    [  # Rajbhandari et al. 2020, section 3, with fp32 gradients; docs/engines.md
        ("ddp", "bf16", 4, 0, 4, 8),
        ("ddp", "fp32", 4, 0, 4, 8),
        ("fsdp", "bf16", 4 / 8, 0, 4 / 8, 8 / 8),
        ("zero1", "fp32", 4, 4 / 8, 4, 8 / 8),
        ("zero1", "bf16", 2, 4 / 8, 4 + 2, 8 / 8),
        ("zero2", "fp32", 4, 4 / 8, 4 / 8, 8 / 8),
        ("zero2", "bf16", 2, 4 / 8, 4 / 8, 8 / 8),
        ("zero3", "fp32", 4 / 8, 4 / 8, 4 / 8, 8 / 8),
        ("zero3", "bf16", 2 / 8, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_per_parameter_on_eight_ranks(
    base: Model, engine: str, compute: str, working: float, masters: float, gradients: float, moments: float
) -> None:
    model = with_precision(base, compute)
    found = state_of(model, sharding_of(engine, model, 8, per_node=8))
    # FSDP2 pads first dimensions that eight does not divide.
    expected = pytest.approx((working, masters, gradients, moments), rel=0.005)
    assert tuple(size / model.parameters for size in found[:4]) == expected
    with_average = model.config.model_copy(update={"optim": model.config.optim.model_copy(update={"ema_decay": 0.999})})
    average = state_of(replace(model, config=with_average), sharding_of(engine, model, 8, per_node=8)).average
    assert (found.average, average) == (0.0, found.moments / 2)


@pytest.fixture
def small() -> Model:
    """Two blocks of 100 parameters each, 10 in the feature encoder and the positional convolution, 8 in the rest."""
    units = [
        Unit(((10,),), 1.0, whole=True), Unit(((10,),), 1.0, whole=True), Unit(((100,),), 1.0, whole=False),
        Unit(((100,),), 1.0, whole=False), Unit(((8,),), 1.0, whole=False),
    ]  # fmt: skip
    backward = ((8, 4), (100, 3), (100, 2), (10, 1), (10, 0))
    model = Model("small", work_settings("base", ["precision.compute=fp32"]), tuple(units), backward, cast=208)
    # The forward goes through the units; then gradients arrive from the last one to the first.
    unit = np.array([4, 0, 4, 1, 4, 2, 3, 4, 4, 3, 2, 1, 0])
    line = Timeline(
        unit=unit,
        backward=np.arange(13) >= 8,
        gradient=np.array([0] * 8 + [8, 100, 100, 10, 10]),
        fixed=np.zeros(13),
        per_utterance=np.array([0.0, 10, 10, 20, 20, 60, 100, 110, 110, 100, 60, 20, 10]),
        seconds=model.config.data.max_seconds,
        forward_seconds=Affine(0.0, 1.0),
        backward_seconds=Affine(0.0, 2.0),
    )
    model.__dict__["timeline"] = line
    return model


def sharding(engine: str, ranks: int, **zero: Any) -> Sharding:
    defaults = {"reduce_bucket_size": 50, "stage3_max_live_parameters": 1000, "stage3_prefetch_bucket_size": 0}
    return Sharding(engine, ranks, ranks, 4, 4, reshards=engine != "fsdp_keep", zero=defaults | zero)


def test_ddp_by_hand(small: Model) -> None:
    """One rank gets its gradients during the backward; several have them in buckets, which are built twice."""
    alone, several = (demand(small, sharding("ddp", 1), forwards=forwards) for forwards in (1, 2))
    state = 12 * 228
    assert alone.footprint(100.0).total == state + 11_000  # at the end of the forward, before any gradient
    assert several.footprint(1.0).total == state + 4 * 228 + 110
    # With little activation memory the end of the backward needs most: all gradients but the last.
    assert alone.footprint(0.0).total == state + 4 * 218
    two = demand(small, sharding("ddp", 2), forwards=1)
    assert two.footprint(100.0).total == state + 4 * 228 + 11_000
    assert two.footprint(0.0).total == state + 2 * 4 * 228


def test_bf16_copies_of_ddp(small: Model) -> None:
    bf16 = replace(sharding("ddp", 1), working_bytes=2)
    assert demand(small, bf16, forwards=2).footprint(1.0).buffers == 2 * 208


def test_fsdp_by_hand(small: Model) -> None:
    """On two ranks, at the first gradient: the rest is gathered, and the last block into its buffer."""
    needed = demand(small, sharding("fsdp", 2), forwards=2)
    assert (needed.parameters, needed.moments) == (4 * 228 / 2, 8 * 228 / 2)
    first, second = 8, 9
    assert needed.gradients[first] == 4 * 228 / 2
    # When the gradients of the rest are complete: they are whole, and reduced from a copy into a share.
    assert needed.buffers[first] == 4 * 8 + 4 * 100 + max(0, (4 + 4 + 2) * 8)
    # The last block ends: its gradients, the copy, the share; the block before is in its buffer. The gathered block is
    # gone by then, and before that neither copy nor share were there: 4 · 100 each.
    assert needed.buffers[second] == 4 * 8 + 4 * 8 + max(4 * 100 + 4 * 100 + 4 * 8, 4 * 100 + (4 + 4 + 2) * 100)
    kept = demand(small, sharding("fsdp_keep", 2), forwards=2)
    assert kept.gradients[0] == 4 * 228 and kept.buffers[7] > needed.buffers[7]


def test_zero2_flushes_its_bucket_when_the_next_gradient_does_not_fit(small: Model) -> None:
    needed = demand(small, sharding("zero2", 2, reduce_bucket_size=110), forwards=1)
    # 8 and 100 fill the bucket; the second block empties it; 100 and 10 fill it; the last ten empty it.
    assert (needed.buffers - 4 * 110 * needed.timeline.backward).tolist()[8:] == [0, 0, 4 * 108, 0, 4 * 10 + 0]
    assert needed.buffers[:8].tolist() == [0] * 8
    overlapping = demand(small, sharding("zero2", 2, reduce_bucket_size=110, overlap_comm=True), forwards=1)
    assert overlapping.buffers[8] == 2 * 4 * 110


def test_zero3_gathers_up_to_its_limit(small: Model) -> None:
    needed = demand(small, sharding("zero3", 2, stage3_max_live_parameters=150), forwards=1)
    assert needed.parameters == (4 + 4) * 228 / 2
    assert needed.buffers[0] == 4 * 50 + 4 * 150
    alone = demand(small, sharding("zero3", 1), forwards=1)
    assert alone.buffers[0] == 4 * 50  # one rank gathers nothing


def test_offloading_moves_the_state_to_the_host(small: Model) -> None:
    here, there = (demand(small, replace(sharding("fsdp", 2), offloads=moved), forwards=2) for moved in (False, True))
    assert there.parameters == there.moments == there.gradients.sum() == 0
    copied = 12 * 228 / 2  # weights and moments, for a checkpoint in the background
    assert there.host == 16 * 228 / 2 + copied and here.host == 0
    zero2 = demand(small, replace(sharding("zero2", 2), offloads=True), forwards=1)
    assert zero2.parameters == 4 * 228  # working weights stay
    assert zero2.host == (4 + 4 + 8 + 4) * 228 / 2 + copied  # masters, gradients, moments, and stepped weights


def test_an_average_of_the_weights_takes_four_bytes_per_parameter(small: Model) -> None:
    work = work_settings("base", ["precision.compute=fp32", "optim.ema_decay=0.999"])
    averaging = replace(small, config=work)
    averaging.__dict__["timeline"] = small.timeline
    for engine, ranks in (("ddp", 2), ("fsdp", 2), ("zero2", 2)):
        without, added = (demand(one, sharding(engine, ranks), forwards=2) for one in (small, averaging))
        share = 228 if engine == "ddp" else 228 / 2
        assert added.moments - without.moments == 4 * share
        for utterances in (0.0, 100.0):
            assert added.footprint(utterances).total - without.footprint(utterances).total == 4 * share
    there = replace(sharding("fsdp", 2), offloads=True)
    without, added = (demand(one, there, forwards=2) for one in (small, averaging))
    assert added.moments == 0 and added.host - without.host == 2 * 4 * 228 / 2  # with the copy for a checkpoint


def test_the_longest_batch_fills_the_memory(small: Model) -> None:
    needed: Demand = demand(small, sharding("ddp", 1), forwards=2)
    longest = needed.longest(10_000)
    assert needed.footprint(longest).total == pytest.approx(10_000)
    assert needed.longest(16 * 228 - 1) < 0
    two = demand(small, sharding("ddp", 2), forwards=2)
    assert two.longest(12 * 228 + 8 * 228 - 1) < 0 < two.longest(12 * 228 + 8 * 228)  # room for two sets of buckets


def test_as_many_micro_batches_share_a_forward_as_fit(small: Model) -> None:
    one = small.utterances * 110  # bytes of activations of a micro-batch
    state = 16 * 228
    assert per_forward(small, sharding("ddp", 1), 8, state + 4.5 * one) == 4  # a divisor of the series
    assert per_forward(small, sharding("ddp", 1), 8, state + 8 * one) == 8
    assert per_forward(small, sharding("ddp", 1), 8, state + 0.5 * one) == 0
    assert usable(81.5e9) == pytest.approx(72e9)


def test_the_engine_of_a_run() -> None:
    def of(*settings: str) -> Sharding:
        return sharding_by(load_config("base", settings), 16, per_node=8)

    assert of("engine.name=ddp").engine == "ddp"
    hybrid = of("engine.name=fsdp", "engine.shard_size=node")
    assert (hybrid.engine, hybrid.shard_size, hybrid.ranks) == ("hsdp", 8, 16)
    assert of("engine.name=fsdp", "engine.offload=true").offloads
    zero = of("engine.name=deepspeed", "engine.deepspeed_config=zero3_offload")
    assert zero.engine == "zero3" and zero.offloads and zero.zero["reduce_bucket_size"] == 20_000_000
    assert not of("engine.name=deepspeed", "engine.deepspeed_config=zero1").offloads


def measured_peaks() -> list[tuple[str, str, float, float]]:
    """Preset, row, seconds of audio of a forward, and bytes, of equal utterances on an H100."""
    phases = json.loads(MEASURED.read_text())["phases"]
    return [
        (preset, key, row["forward_seconds"], row["peak_memory_bytes"])
        for preset in ("base", "large")
        for key, row in phases[f"rates_{preset}"].items()
        if key.startswith("eager/") and key.endswith("/equal")
    ]


def test_peaks_of_an_h100_are_predicted_within_a_twentieth(base: Model) -> None:
    """DDP in one process, updates of 624 s (base) and 480 s (large), bf16, without compilation."""
    models = {"base": base, "large": model_of("large", load_config("large"))}
    rows = measured_peaks()
    assert len(rows) == 6
    for preset, key, seconds, measured in rows:
        model, update = models[preset], {"base": 624, "large": 480}[preset]
        one = sharding_of("ddp", model, 1, per_node=8)
        utterances = seconds / model.config.data.max_seconds
        found = demand(model, one, forwards=round(update / seconds)).footprint(utterances)
        assert found.total == pytest.approx(measured, rel=0.05), (preset, key)
