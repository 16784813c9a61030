"""The plan of a run: which settings fit on given GPUs, which is recommended, and what it costs."""

from __future__ import annotations

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
from w2vscale.planning.fake_pass import fake_pass
from w2vscale.planning.links import CLUSTERS
from w2vscale.planning.plan import Plan, Row, dealt, make_plan, shortened
from w2vscale.planning.rates import measured_rates


@pytest.fixture(autouse=True, scope="module")
def _passes() -> Iterator[None]:
    with passes_run_once():
        yield


@cache
def plan(preset: str, *settings: str, gpus: int, memory: float = 80.0, nodes: int = 1, cluster: str = "h100") -> Plan:
    config, objective = load(preset, settings)
    on = replace(CLUSTERS[cluster], memory=memory * 1e9)
    return make_plan(preset, config, objective, gpus=gpus, nodes=nodes, cluster=on)


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
    assert lacking == sorted(lacking) and len(order) + len(lacking) == len(found.rows) == 8 * 4


@pytest.mark.parametrize(("preset", "gpus"), [long("omni_3b", 4), long("omni_7b", 8), ("large", 1)])
def test_the_longest_micro_batch_needs_all_of_the_memory(preset: str, gpus: int) -> None:
    """The line through two short batches is held to a pass of the whole model with the longest micro-batch."""
    found = plan(preset, gpus=gpus)
    best = found.recommended
    assert best is not None and best.prediction is not None
    config, _ = load(preset, [*found.overrides(best), "data.max_seconds=20"])
    utterances = int(best.longest / 20)
    moments = fake_pass(
        config, utterances=utterances, seconds=20.0, device="cuda", speeds=CLUSTERS["h100"].speeds
    ).moments
    activations = max(moment.live for moment in moments)
    parts = best.footprint
    beside = parts.parameters + parts.gradients + parts.moments + parts.buffers
    assert 0.93 * found.limit < activations + beside < 1.01 * found.limit


def test_the_simplest_of_the_fastest_is_recommended() -> None:
    found = plan("base", gpus=8)
    assert all(one.fits for one in found.rows)
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


def test_nothing_fits_and_more_gpus_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes per parameter are 49 GB: shared by four GPUs 12.3, and 13.1 of 16 GB can be used."""
    monkeypatch.setattr(planning, "SIMPLEST", ("ddp", "fsdp", "zero3"))
    config, objective = load("omni_3b")
    cluster = replace(CLUSTERS["h100"], memory=16e9)
    found = make_plan("omni_3b", config, objective, gpus=1, nodes=1, cluster=cluster)
    assert found.recommended is None and not any(one.fits for one in found.rows)
    assert found.enough == 8


def test_no_number_of_gpus_has_room_for_the_activations() -> None:
    found = plan("omni_3b", gpus=1, memory=2.0)
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


def test_offloading_is_slower_and_needs_host_memory() -> None:
    found = plan("omni_3b", gpus=4)
    for engine in ("fsdp", "zero2", "zero3"):
        here, there = row(found, engine, "selective"), row(found, f"{engine}_offload", "selective")
        assert there.footprint.total < here.footprint.total and there.footprint.host > 12 * 3.06e9 / 4
        assert here.prediction is not None and there.prediction is not None
        assert there.prediction.seconds > here.prediction.seconds


@pytest.mark.parametrize("preset", ["ctc_10h", long("best_rq_base")])
def test_other_objectives(preset: str) -> None:
    found = plan(preset, gpus=1)
    assert check_recommendation(found, preset).engine == "ddp"


def test_an_objective_that_changes_its_model_has_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    config, objective = load("tiny")
    monkeypatch.setattr(type(objective), "after_step", lambda self, module, update: None)
    assert objective.changes_model
    found = make_plan("tiny", config, objective, gpus=2, nodes=1, cluster=CLUSTERS["h100"])
    assert {one.engine for one in found.rows} == {"ddp", "fsdp", "fsdp_offload"}
