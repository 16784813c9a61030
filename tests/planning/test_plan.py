"""The plan of a run: which settings fit on given GPUs, which is recommended, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from tests.helpers.passes import passes_run_once
from tests.helpers.tiers import long
from tools.scaling.growth import MEASURED
from w2vscale.errors import UserError
from w2vscale.objectives import load
from w2vscale.planning import plan as planning
from w2vscale.planning import prediction
from w2vscale.planning.exposure import Corpus
from w2vscale.planning.fake_pass import fake_pass
from w2vscale.planning.links import CLUSTERS
from w2vscale.planning.plan import Plan, Row, dealt, make_plan, shortened
from w2vscale.planning.prediction import Setting, predict
from w2vscale.planning.rates import measured_rates
from w2vscale.planning.traffic import sharding_by, sharding_of
from w2vscale.planning.work import Model


@pytest.fixture(autouse=True, scope="module")
def _passes() -> Iterator[None]:
    with passes_run_once():
        yield


@cache
def plan(
    preset: str, *settings: str, gpus: int, memory: float = 80.0, nodes: int = 1, cluster: str = "h100",
    recomputations: tuple[str, ...] = ("none", "full"), host_memory: float = math.inf, corpus: Corpus | None = None,
) -> Plan:  # fmt: skip
    config, objective = load(preset, settings)
    on = replace(CLUSTERS[cluster], memory=memory * 1e9, host_memory=host_memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "RECOMPUTATIONS", recomputations)
        return make_plan(preset, config, objective, gpus=gpus, nodes=nodes, cluster=on, corpus=corpus)


def row(found: Plan, engine: str, recomputation: str) -> Row:
    (only,) = [one for one in found.rows if (one.engine, one.recomputation) == (engine, recomputation)]
    return only


def check_recommendation(found: Plan, preset: str) -> Row:
    """It fits, its settings are valid, and they are what was planned."""
    best = found.recommended
    assert best is not None and best.prediction is not None
    config, _ = load(preset, found.overrides(best))
    assert config.batch.micro_batches % found.gpus == 0
    assert config.batch.max_seconds <= best.longest
    assert config.engine.activation_checkpointing == best.recomputation
    assert best.prediction.days == pytest.approx(best.prediction.seconds * config.trainer.updates / 86400)
    assert best.prediction.gpu_hours == pytest.approx(24 * found.gpus * best.prediction.days)
    return best


def test_three_billion_parameters_on_four_gpus() -> None:
    """As in omnilingual-asr#34, where no strategy worked."""
    found = plan("omni_3b", gpus=4)
    assert found.model.parameters == 3_064_124_672  # published
    best = check_recommendation(found, "omni_3b")
    assert best.footprint.total < found.limit
    # The state by the formulas of ZeRO: 16 bytes per parameter on each GPU, or shared by four.
    for engine, share in (("ddp", 1), ("fsdp", 4)):
        one = row(found, engine, "none").footprint
        assert one.parameters + one.gradients + one.moments == pytest.approx(16 * 3.064e9 / share, rel=0.01)
    # A GPU needs at least the operations of the audio at the full rate of its matrix products.
    assert best.prediction is not None
    audio = 128 * 0.9 * 75 * found.model.flops
    assert best.prediction.seconds > audio / (4 * 8e14)
    assert best.prediction.seconds < 3 * audio / (4 * 8e14)


def test_seven_billion_parameters_on_eight_gpus() -> None:
    found = plan("omni_7b", gpus=8)
    assert found.model.parameters == 6_488_487_168  # published
    best = check_recommendation(found, "omni_7b")
    assert best.engine not in ("ddp", "zero1")
    assert not any(one.fits for one in found.rows if one.engine == "ddp")  # 16 bytes per parameter are 104 GB
    assert found.rows[-1].lacks > 0 and found.rows[-1].prediction is None
    order = [one.prediction.seconds for one in found.rows if one.prediction is not None]
    assert order == sorted(order)
    lacking = [one.lacks for one in found.rows if not one.fits]
    assert lacking == sorted(lacking) and len(order) + len(lacking) == len(found.rows) == 8 * 2


@pytest.mark.parametrize(
    ("preset", "gpus", "memory"),
    [long("omni_3b", 4, 80.0), long("omni_7b", 8, 80.0), long("large", 1, 80.0), ("base", 1, 20.0)],
)
def test_the_longest_micro_batch_needs_all_of_the_memory(preset: str, gpus: int, memory: float) -> None:
    """The line through two short batches is held to a pass of the whole model with the longest micro-batch."""
    found = plan(preset, gpus=gpus, memory=memory)
    best = found.recommended
    assert best is not None and best.prediction is not None
    config, _ = load(preset, found.overrides(best))
    seconds = config.data.max_seconds
    moments = fake_pass(
        config, utterances=int(best.longest / seconds), seconds=seconds, device="cuda", speeds=CLUSTERS["h100"].speeds
    ).moments
    activations = max(moment.live for moment in moments)
    parts = best.footprint
    beside = parts.parameters + parts.gradients + parts.moments + parts.buffers
    assert 0.93 * found.limit < activations + beside < 1.01 * found.limit


def test_the_simplest_of_the_fastest_is_recommended() -> None:
    found = plan("base", gpus=8, recomputations=("none", "features", "selective", "full"))
    assert all(one.fits for one in found.rows) and len(found.rows) == 8 * 4
    best = check_recommendation(found, "base")
    assert (best.engine, best.recomputation) == ("ddp", "none")
    assert found.rows[0].prediction is not None and best.prediction is not None
    assert best.prediction.seconds <= 1.03 * found.rows[0].prediction.seconds
    assert best.prediction.per_forward == 8  # all micro-batches of a GPU: 8 x 87.5 s
    # Recomputing everything takes at most a forward more.
    full = row(found, "ddp", "full").prediction
    assert full is not None and 1.05 < full.seconds / best.prediction.seconds < 4 / 3 + 0.02


def test_small_gpus_get_shorter_micro_batches_and_as_much_audio() -> None:
    found = plan("base", gpus=8, memory=4.4)
    one = row(found, "ddp", "none")
    assert one.fits and one.footprint.total > found.limit and 15.625 <= one.longest < 87.5
    overrides = found.overrides(one)
    config, _ = load("base", overrides)
    assert config.batch.max_seconds <= one.longest
    assert config.batch.max_seconds * config.batch.micro_batches == pytest.approx(87.5 * 64, rel=0.05)
    assert config.batch.micro_batches % 8 == 0


def test_nothing_fits_and_more_gpus_would_do() -> None:
    """16 bytes per parameter are 49 GB: shared by four GPUs 12.3, by eight 6.1, and 9.5 of 12 GB can be used."""
    found = plan("omni_3b", gpus=4, memory=12.0, host_memory=0.0)
    assert found.recommended is None and found.enough == 8


def test_no_number_of_gpus_has_room_for_the_activations() -> None:
    found = plan("omni_3b", gpus=4, memory=2.0)
    assert found.recommended is None and found.enough is None


def test_micro_batches_are_dealt() -> None:
    assert [dealt(count, gpus) for count, gpus in ((64, 8), (64, 6), (1, 4), (128, 12))] == [64, 66, 4, 132]
    found = plan("base", gpus=6)
    assert found.micro_batches == 66 and found.model.config.batch.micro_batches == 64
    assert "batch.micro_batches=66" in found.overrides(found.rows[0])
    assert "batch.micro_batches" not in " ".join(plan("base", gpus=8).overrides(plan("base", gpus=8).rows[0]))


def test_a_shorter_batch_has_room_for_the_longest_utterance() -> None:
    config, _ = load("base")
    assert shortened(config, 100.0, gpus=8) == config.batch
    half = shortened(config, 50.0, gpus=8)
    assert (half.max_seconds, half.micro_batches) == (43.75, 128)
    least = shortened(config, 16.0, gpus=8)
    assert (least.max_seconds, least.micro_batches) == (15.625, 360)  # 64 x 87.5 / 15.625 = 358.4


def test_several_nodes_have_settings_of_their_own() -> None:
    found = plan("base", gpus=16, nodes=2, cluster="cloud")
    names = {one.engine for one in found.rows}
    assert {"hsdp", "fsdp_keep"} <= names and found.nodes == 2
    assert not {"hsdp", "fsdp_keep"} & {one.engine for one in plan("base", gpus=8).rows}
    predictions = [row(found, engine, "none").prediction for engine in ("fsdp", "hsdp")]
    across, inside = (one.seconds for one in predictions if one is not None)
    assert inside < across  # 25 Gb/s between the nodes
    overrides = found.overrides(row(found, "hsdp", "none"))
    assert load("base", overrides)[0].engine.shard_size == "node"
    with pytest.raises(UserError, match="--gpus 16: cannot be spread evenly over 3 nodes; set --nodes"):
        plan("base", gpus=16, nodes=3)


def test_measured_rates_replace_the_roofline() -> None:
    config, objective = load("base")
    measured = measured_rates(MEASURED)
    found = make_plan("base", config, objective, gpus=1, nodes=1, cluster=CLUSTERS["h100"], measured=measured)
    best = row(found, "ddp", "none").prediction
    assert best is not None and best.audio_per_second == pytest.approx(6_077, rel=0.06)  # in 624 s per forward
    by_roofline = plan("base", gpus=1)
    assert by_roofline.recommended is not None and by_roofline.recommended.prediction is not None
    assert by_roofline.recommended.prediction.audio_per_second == pytest.approx(6_077, rel=0.15)


def test_measured_rates_do_not_depend_on_the_speed_of_the_cluster(tiny: Model) -> None:
    rates = measured_rates(MEASURED)["base"]
    sharding = sharding_of("ddp", tiny, 8, per_node=8)
    slow = replace(CLUSTERS["h100"], flops=1e14)
    fast, same = (
        predict(tiny, sharding, 4, per_forward=4, setting=Setting(cluster, "fastest", rates))
        for cluster in (CLUSTERS["h100"], slow)
    )
    assert fast == same and fast.computing > 4 * tiny.micro_batch_seconds * tiny.flops / rates.flops


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_many_forwards_are_predicted_from_fewer(tiny: Model, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sharding = sharding_of(engine, tiny, 8, per_node=8)
    setting = Setting(CLUSTERS["cloud"], "fastest", measured_rates(MEASURED)["base"])
    placed = predict(tiny, sharding, 60, per_forward=1, setting=setting)
    monkeypatch.setattr(prediction, "MOST_FORWARDS", 10)
    assert vars(predict(tiny, sharding, 60, per_forward=1, setting=setting)) == pytest.approx(vars(placed))


def test_without_compilation_it_is_slower() -> None:
    """Windows of the record in the longest forwards, eager and compiled: 107.2 and 98.6 ms, 182.5 and 165.9 ms."""
    compiled, eager = (
        row(plan("base", f"engine.compile={choice}", gpus=8), "ddp", "none").prediction for choice in ("auto", "false")
    )
    assert compiled is not None and eager is not None
    assert 107.2 / 98.6 - 0.01 < eager.computing / compiled.computing < 182.5 / 165.9
    zero2, zero3 = (row(plan("base", gpus=8), engine, "none").prediction for engine in ("zero2", "zero3"))
    assert zero2 is not None and zero3 is not None  # which is never compiled
    assert zero3.computing / zero2.computing == pytest.approx(eager.computing / compiled.computing, rel=0.01)
    # One forward per update: sharding takes 35 and 100 ms more (docs/performance.md).
    assert (zero2.host - compiled.host, zero3.host - compiled.host) == pytest.approx((0.035, 0.1))


def test_offloading_is_slower_and_needs_host_memory() -> None:
    found = plan("omni_3b", gpus=4)
    for engine in ("fsdp", "zero2", "zero3"):
        here, there = row(found, engine, "full"), row(found, f"{engine}_offload", "full")
        assert there.footprint.total < here.footprint.total and there.footprint.host > 12 * 3.06e9 / 4
        assert here.prediction is not None and there.prediction is not None
        assert there.prediction.seconds > here.prediction.seconds


def test_host_memory_is_limited() -> None:
    """FSDP2 needs 28 bytes per parameter of a node's host memory: 85.8 GB; ZeRO more."""
    found = plan("omni_3b", gpus=4, host_memory=86.5e9)
    assert row(found, "fsdp", "full").fits and row(found, "fsdp_offload", "full").fits
    for engine in ("zero2_offload", "zero3_offload"):
        one = row(found, engine, "full")
        assert not one.fits and one.lacks == 0.0
        assert one.lacks_host == pytest.approx(4 * one.footprint.host - 86.5e9)
    waiting = plan("omni_3b", "checkpoint.asynchronous=false", gpus=4, host_memory=50e9)
    assert row(waiting, "fsdp_offload", "full").footprint.host == pytest.approx(16 * 3.064e9 / 4, rel=0.01)


def test_micro_batches_of_a_forward_can_be_set() -> None:
    one, four = (row(plan("base", f"batch.concat={count}", gpus=8), "ddp", "none") for count in (1, 4))
    assert one.prediction is not None and four.prediction is not None
    assert (one.prediction.per_forward, four.prediction.per_forward) == (1, 4)
    assert four.footprint.activations == pytest.approx(4 * one.footprint.activations, rel=0.02)
    assert four.longest == pytest.approx(one.longest / 4)
    # More micro-batches than a GPU has in an update are not joined; shorter ones may then be.
    all_of_them = row(plan("base", "batch.concat=64", gpus=8), "ddp", "none")
    assert all_of_them.prediction is not None and all_of_them.prediction.per_forward == 8
    small = row(plan("base", "batch.concat=4", gpus=8, memory=12.0), "ddp", "none")
    assert small.prediction is not None and small.footprint.total > 0.9 * (12e9 - 1.5e9)
    batch = small.prediction.model.config.batch
    assert small.prediction.per_forward == 4 and 4 * batch.max_seconds < 350 and batch.micro_batches > 64


def test_seconds_of_audio_are_those_of_the_corpus() -> None:
    """Micro-batches of 40 s that are half full."""
    found = plan("tiny", gpus=2, corpus=Corpus(hours=10.0, micro_batches=1800))
    best = found.recommended
    assert best is not None and best.prediction is not None
    audio = best.prediction.audio_per_second * best.prediction.seconds
    assert audio == pytest.approx(3600 * found.exposure.hours_per_update) == pytest.approx(2 * 20.0)


PLANNED = {
    "ddp": ("ddp", False, None, True),
    "fsdp": ("fsdp", False, None, True),
    "fsdp_keep": ("fsdp", False, None, False),
    "hsdp": ("fsdp", False, "node", True),
    "fsdp_offload": ("fsdp", True, None, True),
    **dict.fromkeys(("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"), ("deepspeed", False, None, True)),
}
"""Name, offload, shard_size and reshard_after_forward of each engine."""


@pytest.mark.parametrize(
    "given",
    [
        ("engine={name: fsdp, offload: true, shard_size: 4, reshard_after_forward: false, compile: true}",),
        ("engine={name: deepspeed, deepspeed_config: zero3_offload, activation_checkpointing: full}",),
    ],
)
def test_the_settings_to_type_are_those_of_the_planned_engine(given: tuple[str, ...]) -> None:
    found = plan("tiny", *given, gpus=16, nodes=2)
    assert {one.engine for one in found.rows} == set(PLANNED)
    for one in found.rows:
        assert one.prediction is not None
        config, _ = load("tiny", [*given, *found.overrides(one)])
        engine = config.engine
        chosen = (engine.name, engine.offload, engine.shard_size, engine.reshard_after_forward)
        assert chosen == PLANNED[one.engine] and engine.activation_checkpointing == one.recomputation
        if engine.name == "deepspeed":
            assert engine.deepspeed_config == one.engine
        assert sharding_by(config, 16, per_node=8) == one.prediction.sharding
        assert config.batch == one.prediction.model.config.batch
        if "compile: true" in given[0]:  # which ZeRO-3 refuses
            assert engine.compile is not one.engine.startswith("zero3")


@pytest.mark.parametrize("preset", ["ctc_10h", long("best_rq_base")])
def test_other_objectives(preset: str) -> None:
    found = plan(preset, gpus=1, recomputations=("none",), memory=160.0)
    assert check_recommendation(found, preset).engine == "ddp"


def test_an_objective_that_changes_its_model_has_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    config, objective = load("tiny")
    monkeypatch.setattr(type(objective), "after_step", lambda self, module, update: None)
    assert objective.changes_model
    monkeypatch.setattr(planning, "RECOMPUTATIONS", ("none",))
    found = make_plan("tiny", config, objective, gpus=2, nodes=1, cluster=CLUSTERS["h100"])
    assert {one.engine for one in found.rows} == {"ddp", "fsdp", "fsdp_offload"}
