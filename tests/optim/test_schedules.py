"""Learning rate and Gumbel temperature against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.config import OptimConfig, ScheduleConfig, load_config
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import ContrastiveSettings
from w2vscale.optim.schedules import learning_rate

PEAK = 2e-3
UPDATES = 1000
WARMUP = 100


def rate(update: int, *, updates: int = UPDATES, **settings: object) -> float:
    """The learning rate as a share of the peak."""
    schedule = ScheduleConfig.model_validate({"warmup_updates": WARMUP, **settings})
    return learning_rate(update, optim=OptimConfig(lr=PEAK), schedule=schedule, updates=updates) / PEAK


class TestWarmup:
    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_rises_linearly_from_one_share_to_the_peak_at_its_last_update(self, kind: str) -> None:
        assert rate(0, kind=kind) == pytest.approx(1 / WARMUP)
        assert rate(49, kind=kind) == pytest.approx(0.5)
        assert rate(WARMUP - 1, kind=kind) == pytest.approx(1.0)
        assert rate(WARMUP, kind=kind) < 1.0

    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_may_be_left_out_or_be_the_whole_run(self, kind: str) -> None:
        assert 0.99 < rate(0, kind=kind, warmup_updates=0) < 1.0
        assert rate(UPDATES - 1, kind=kind, warmup_updates=UPDATES) == pytest.approx(1.0)
        assert rate(0, kind=kind, warmup_updates=0, updates=1, final_ratio=0.2) == pytest.approx(0.2)


class TestCosine:
    def test_is_half_way_down_in_the_middle_and_at_the_floor_at_the_end(self) -> None:
        middle = WARMUP + (UPDATES - WARMUP) // 2 - 1
        assert rate(middle) == pytest.approx(0.1 + 0.9 / 2)
        assert rate(UPDATES - 1) == pytest.approx(0.1)

    @pytest.mark.parametrize("quarter", [1, 2, 3])
    def test_follows_the_cosine(self, quarter: int) -> None:
        update = WARMUP + (UPDATES - WARMUP) * quarter // 4 - 1
        expected = 0.3 + 0.7 * 0.5 * (1 + math.cos(math.pi * quarter / 4))
        assert rate(update, final_ratio=0.3) == pytest.approx(expected)

    def test_stays_at_the_floor_beyond_the_end(self) -> None:
        assert rate(10 * UPDATES) == pytest.approx(0.1)

    def test_a_floor_of_zero_ends_at_zero(self) -> None:
        assert rate(UPDATES - 1, final_ratio=0.0) == pytest.approx(0.0, abs=1e-12)


class TestLinear:
    def test_falls_by_equal_steps_to_the_floor(self) -> None:
        floor = {"kind": "linear", "final_ratio": 0.1}
        steps = [rate(update, **floor) - rate(update + 1, **floor) for update in (100, 500, 998)]
        assert steps == pytest.approx([0.9 / 900] * 3)
        assert rate(UPDATES - 1, **floor) == pytest.approx(0.1)

    def test_ends_at_zero_unless_asked_otherwise(self) -> None:
        assert rate(UPDATES - 1, kind="linear") == rate(10 * UPDATES, kind="linear") == 0.0


class TestFirstStep:
    """fairseq's `polynomial_decay` and Transformers' schedules: update u has our rate of update u - 1."""

    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_zero_runs_one_update_behind(self, kind: str) -> None:
        assert rate(0, kind=kind, first_step=0) == 0.0
        later = [rate(update, kind=kind, first_step=0) for update in range(1, UPDATES)]
        assert later == [rate(update, kind=kind) for update in range(UPDATES - 1)]

    def test_zero_equals_the_schedule_of_transformers(self) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, UPDATES)
        for update in range(UPDATES):
            assert rate(update, kind="linear", first_step=0) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            schedule.step()

    def test_without_a_warm_up_it_starts_at_the_peak(self) -> None:
        assert rate(0, kind="linear", first_step=0, warmup_updates=0) == 1.0


class TestTriStage:
    """fairseq's tri-stage schedule (Park et al. 2019), as fine-tuning uses it."""

    def stage(self, update: int) -> float:
        return rate(update, kind="tri_stage", stages=(0.1, 0.4, 0.5), initial_ratio=0.01, final_ratio=0.05)

    def test_rises_from_the_initial_ratio(self) -> None:
        assert self.stage(0) == pytest.approx(0.01)
        assert self.stage(50) == pytest.approx(0.01 + 0.99 / 2)

    def test_stays_at_the_peak(self) -> None:
        assert [self.stage(update) for update in (100, 300, 499)] == pytest.approx([1.0] * 3)

    def test_decays_exponentially_to_the_final_ratio_after_the_last_update(self) -> None:
        assert self.stage(750) == pytest.approx(math.sqrt(0.05))
        assert self.stage(UPDATES) == self.stage(2 * UPDATES) == pytest.approx(0.05)
        assert rate(UPDATES, kind="tri_stage") == pytest.approx(0.05)
        ratios = [self.stage(update + 1) / self.stage(update) for update in (500, 700, 997)]
        assert ratios == pytest.approx([0.05 ** (1 / 500)] * 3)

    def test_stages_of_no_length_are_left_out(self) -> None:
        assert rate(0, kind="tri_stage", stages=(0.0, 0.5, 0.5)) == 1.0
        assert rate(UPDATES - 1, kind="tri_stage", stages=(0.5, 0.5, 0.0)) == 1.0
        assert rate(UPDATES, kind="tri_stage", stages=(0.0, 0.0, 1.0), final_ratio=0.2) == pytest.approx(0.2)


@given(
    kind=st.sampled_from(["cosine", "linear", "tri_stage"]),
    updates=st.integers(1, 2000),
    share=st.floats(0, 1),
    floor=st.floats(0.01, 1),
)
def test_any_schedule_rises_then_falls_between_zero_and_the_peak(
    kind: str, updates: int, share: float, floor: float
) -> None:
    settings = {"kind": kind, "warmup_updates": int(share * updates), "final_ratio": floor}
    found = [rate(update, updates=updates, **settings) for update in range(updates)]
    assert all(0.0 < value <= 1.0 + 1e-9 for value in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == pytest.approx(sorted(found[top:], reverse=True))
    assert min(found) > 0.0


class TestGumbelTemperature:
    def test_decays_by_a_factor_an_update(self) -> None:
        temperature = ContrastiveSettings().temperature
        assert temperature(0) == 2.0
        assert temperature(1) == pytest.approx(2.0 * 0.999995)
        assert temperature(100_000) == pytest.approx(2.0 * math.exp(-0.5), rel=1e-4)

    @pytest.mark.parametrize(("preset", "floor"), [("base", 0.5), ("large", 0.1)])
    def test_stops_at_the_floor(self, preset: str, floor: float) -> None:
        temperature = build_objective(load_config(preset)).settings.temperature
        reached = math.ceil(math.log(2.0 / floor) / -math.log(0.999995))
        assert temperature(reached - 10) > floor
        assert temperature(reached + 1) == temperature(10**7) == floor
