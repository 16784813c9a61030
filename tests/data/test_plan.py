"""Every property of the plan, for corpora that hypothesis makes up."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from w2vscale.config import BatchConfig
from w2vscale.data import plan as plan_module
from w2vscale.data.plan import (
    Bucket,
    Plan,
    PlannedMicroBatch,
    largest_divisor,
    length_of_series,
    rank_window,
    run_length,
)
from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError

MAX_SAMPLES = 100
MIN_SAMPLES = 10


@dataclass(frozen=True)
class Case:
    """A corpus, the settings that it is planned with, and its plan."""

    samples: NDArray[np.int64]
    budget: int
    buckets: int
    series_length: int
    plan: Plan

    def again(self, **changes: int) -> Plan:
        """Another plan of the same corpus and settings, apart from `changes`."""
        settings = {"budget_samples": self.budget, "buckets": self.buckets, "series_length": self.series_length}
        return make_plan(self.samples, **{**settings, "seed": self.plan.seed, **changes})

    @property
    def kept(self) -> set[int]:
        return set(np.flatnonzero(self.samples >= MIN_SAMPLES).tolist())

    def bucket_of(self) -> dict[int, Bucket]:
        """Each utterance's bucket: they are runs of the utterances sorted by cropped length."""
        order = sorted(self.kept, key=lambda utterance: (-min(int(self.samples[utterance]), MAX_SAMPLES), utterance))
        return {order[bucket.start + i]: bucket for bucket in self.plan.buckets for i in range(bucket.count)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 400 utterances, of few or many different lengths, some too short and some to be cropped."""
    longest = draw(st.sampled_from([MIN_SAMPLES, 12, 2 * MAX_SAMPLES]))
    count = draw(st.integers(1, 150) | st.integers(150, 400))
    samples = np.random.default_rng(draw(st.integers(0, 999))).integers(1, longest + 1, size=count)
    samples[0] = draw(st.integers(MIN_SAMPLES, longest))
    budget = draw(st.sampled_from([MAX_SAMPLES, 150, 999, 10_000]))
    buckets = draw(st.sampled_from([1, 2, 7, 64, 1000]))
    series_length = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    seed = draw(st.integers(0, 2**63 - 1))
    settings = {"budget_samples": budget, "buckets": buckets, "series_length": series_length}
    return Case(samples, budget, buckets, series_length, make_plan(samples, seed=seed, **settings))


def make_plan(samples: NDArray[np.int64], **changes: int) -> Plan:
    arguments = {"max_samples": MAX_SAMPLES, "min_samples": MIN_SAMPLES, "budget_samples": 400, "buckets": 8, "seed": 3}
    return Plan(samples, **{**arguments, **changes})


def varied(count: int = 300, *, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, 2 * MAX_SAMPLES, size=count)


def epoch(plan: Plan, number: int) -> list[PlannedMicroBatch]:
    return [plan.micro_batch(number * plan.per_epoch + i) for i in range(plan.per_epoch)]


def key(batch: PlannedMicroBatch) -> tuple[int, int, bytes, bytes, bytes]:
    return batch.number, batch.epoch, batch.utterances.tobytes(), batch.offsets.tobytes(), batch.lengths.tobytes()


class TestEpochs:
    @given(cases())
    def test_every_kept_utterance_appears_exactly_once_in_each(self, case: Case) -> None:
        for number in (0, 1, 2, 1000):
            found = Counter(int(u) for batch in epoch(case.plan, number) for u in batch.utterances)
            assert set(found) == case.kept
            assert set(found.values()) == {1}

    @given(cases())
    def test_the_plan_counts_what_it_kept_and_left_out(self, case: Case) -> None:
        assert len(case.plan) == len(case.kept)
        assert case.plan.left_out == case.samples.size - len(case.kept)

    @given(cases())
    def test_number_and_epoch_follow_from_the_position(self, case: Case) -> None:
        plan = case.plan
        for number in (0, plan.per_epoch - 1, plan.per_epoch, 3 * plan.per_epoch, 10**9):
            batch = plan.micro_batch(number)
            assert (batch.number, batch.epoch) == (number, number // plan.per_epoch)
            assert batch.utterances.size > 0

    @given(cases(), st.integers(0, 2**63 - 1))
    def test_all_have_equally_many_micro_batches_of_the_same_sizes_whatever_the_seed(
        self, case: Case, seed: int
    ) -> None:
        other = case.again(seed=seed)
        assert other.per_epoch == case.plan.per_epoch
        found = [epoch(case.plan, 0), epoch(case.plan, 1), epoch(other, 5)]
        sizes = [sorted(batch.utterances.size for batch in batches) for batches in found]
        assert sizes[0] == sizes[1] == sizes[2]

    @given(cases())
    def test_only_the_last_series_of_an_epoch_can_have_room_left(self, case: Case) -> None:
        bucket_of = case.bucket_of()
        batches = epoch(case.plan, 1)
        room = [bucket_of[int(batch.utterances[0])].per_micro_batch - batch.utterances.size for batch in batches]
        series = case.plan.series_length
        assert min(room) == 0 or len(case.plan.buckets) == 1
        assert sum(room) < series * case.plan.buckets[-1].per_micro_batch
        if series == 1:
            assert sum(left > 0 for left in room) <= 1

    @given(cases())
    def test_micro_batches_of_the_last_bucket_have_equally_many_utterances_give_or_take_one(self, case: Case) -> None:
        last, bucket_of = case.plan.buckets[-1], case.bucket_of()
        sizes = [b.utterances.size for b in epoch(case.plan, 1) if bucket_of[int(b.utterances[0])] is last]
        assert len(sizes) == last.micro_batches
        if case.plan.series_length > 1:
            assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("series_length", [1, 4])
    @pytest.mark.parametrize("buckets", [2, 3, 5])
    @pytest.mark.parametrize("budget", [350, 999, 1234])
    def test_buckets_end_on_whole_series(self, buckets: int, budget: int, series_length: int) -> None:
        lengths = np.random.default_rng(0).integers(MIN_SAMPLES, MAX_SAMPLES, size=1500)
        plan = make_plan(lengths, budget_samples=budget, buckets=buckets, series_length=series_length)
        assert len(plan.buckets) > 1 and plan.series_length == series_length
        assert all(bucket.count % (series_length * bucket.per_micro_batch) == 0 for bucket in plan.buckets[:-1])

    def test_the_order_of_buckets_changes_from_one_to_the_next(self) -> None:
        samples = varied()
        case = Case(samples, 400, 8, 1, make_plan(samples))
        bucket_of = case.bucket_of()
        orders = [[bucket_of[int(batch.utterances[0])] for batch in epoch(case.plan, number)] for number in range(3)]
        assert orders[0] != orders[1] != orders[2] != orders[0]

    def test_a_micro_batch_has_other_companions_in_another_epoch(self) -> None:
        plan = make_plan(varied())
        first, second = ({frozenset(batch.utterances.tolist()) for batch in epoch(plan, n)} for n in (0, 1))
        assert len(first & second) < len(first) / 2


class TestMicroBatches:
    @given(cases())
    def test_padded_samples_stay_within_the_budget_in_every_epoch(self, case: Case) -> None:
        for number in (0, 7):
            assert max(batch.utterances.size * batch.longest for batch in epoch(case.plan, number)) <= case.budget

    @given(cases())
    def test_a_bucket_has_as_many_a_micro_batch_as_the_budget_allows_for_its_longest(self, case: Case) -> None:
        cropped = np.minimum(case.samples, MAX_SAMPLES)
        for utterance, bucket in case.bucket_of().items():
            assert cropped[utterance] <= bucket.longest
            assert bucket.per_micro_batch == case.budget // bucket.longest

    @given(cases())
    def test_all_of_a_micro_batch_are_of_one_bucket(self, case: Case) -> None:
        bucket_of = case.bucket_of()
        assert all(len({bucket_of[int(u)].start for u in batch.utterances}) == 1 for batch in epoch(case.plan, 2))

    @given(cases())
    def test_crops_lie_within_their_utterances_and_short_utterances_are_whole(self, case: Case) -> None:
        for batch in epoch(case.plan, 3):
            samples = case.samples[batch.utterances]
            assert batch.lengths.tolist() == np.minimum(samples, MAX_SAMPLES).tolist()
            assert (batch.offsets >= 0).all()
            assert (batch.offsets + batch.lengths <= samples).all()
            assert batch.longest == batch.lengths.max()

    def test_crops_reach_both_ends_evenly(self) -> None:
        plan = make_plan(np.full(4, MAX_SAMPLES + 3, dtype=np.int64))
        offsets = Counter(int(o) for n in range(500) for batch in epoch(plan, n) for o in batch.offsets)
        assert set(offsets) == {0, 1, 2, 3}
        assert min(offsets.values()) > 400

    def test_micro_batches_of_one_epoch_draw_their_own_crops(self) -> None:
        plan = make_plan(np.full(40, 50 * MAX_SAMPLES, dtype=np.int64))
        assert len({batch.offsets.tobytes() for batch in epoch(plan, 0)}) == plan.per_epoch

    @given(cases())
    def test_there_are_no_more_buckets_than_asked_for_and_they_hold_everything(self, case: Case) -> None:
        assert 1 <= len(case.plan.buckets) <= case.buckets
        assert sum(bucket.count for bucket in case.plan.buckets) == len(case.plan)

    @given(cases())
    def test_a_bucket_has_one_width_if_it_is_padded_to(self, case: Case) -> None:
        plan = case.again(pad_to_bucket=True)
        bucket_of = case.bucket_of()
        for batch in epoch(plan, 1):
            assert batch.width == bucket_of[int(batch.utterances[0])].longest

    def test_more_buckets_mean_less_padding(self) -> None:
        samples = varied(3000)
        padding = [make_plan(samples, buckets=buckets).padding() for buckets in (1, 4, 16)]
        assert padding[0] > padding[1] > padding[2]
        assert padding[2] < 0.1

    def test_utterances_of_one_length_all_mix_with_each_other(self) -> None:
        cropped = np.full(200, 3 * MAX_SAMPLES, dtype=np.int64)
        assert len(make_plan(cropped, buckets=64).buckets) == 1


class TestSeries:
    @given(cases())
    def test_consecutive_micro_batches_are_of_one_bucket_in_every_epoch(self, case: Case) -> None:
        bucket_of = case.bucket_of()
        length = case.plan.series_length
        assert case.plan.per_epoch % length == 0
        for number in (0, 1, 1000):
            found = [bucket_of[int(batch.utterances[0])] for batch in epoch(case.plan, number)]
            assert all(len(set(found[start : start + length])) == 1 for start in range(0, len(found), length))

    @given(cases())
    def test_their_length_is_the_largest_divisor_that_adds_few_micro_batches(self, case: Case) -> None:
        plan, length = case.plan, case.plan.series_length
        assert case.series_length % length == 0
        needed = sum(-(-bucket.count // bucket.per_micro_batch) for bucket in plan.buckets)
        assert plan.per_epoch - needed <= plan_module.ADDED_MICRO_BATCHES * plan.per_epoch
        for longer in range(length + 1, case.series_length + 1):
            if case.series_length % longer == 0:
                assert case.again(series_length=longer).series_length < longer

    @pytest.mark.parametrize(
        ("utterances", "asked", "found"),
        [(4000, 8, 8), (100, 8, 4), (99, 8, 1), (90, 8, 2), (90, 12, 6), (8, 8, 8), (7, 8, 1), (1, 8, 1)],
    )
    def test_those_of_micro_batches_of_one_utterance_divide_the_corpus(
        self, utterances: int, asked: int, found: int
    ) -> None:
        """Nothing else makes an epoch of whole series without an empty micro-batch."""
        lengths = np.full(utterances, MAX_SAMPLES, dtype=np.int64)
        assert make_plan(lengths, budget_samples=MAX_SAMPLES, series_length=asked).series_length == found

    def test_of_one_micro_batch_are_slices_of_shuffled_buckets(self) -> None:
        """Written out: the plan before there were series, which golden curves and old checkpoints depend on."""
        samples = varied()
        plan = make_plan(samples, seed=5)
        kept = np.flatnonzero(samples >= MIN_SAMPLES)
        by_length = kept[np.argsort(-np.minimum(samples[kept], MAX_SAMPLES), kind="stable")]
        for number in range(2 * plan.per_epoch):
            epoch, position = divmod(number, plan.per_epoch)
            shuffled = generator(5, Stream.EPOCH_ORDER, epoch).permutation(np.arange(plan.per_epoch, dtype=np.int32))
            index = shuffled[position]
            which = max(i for i, bucket in enumerate(plan.buckets) if bucket.first_micro_batch <= index)
            bucket = plan.buckets[which]
            inside = generator(5, Stream.BUCKET_ORDER, epoch, which).permutation(
                np.arange(bucket.count, dtype=np.int32)
            )
            first = (index - bucket.first_micro_batch) * bucket.per_micro_batch
            members = by_length[bucket.start + inside[first : first + bucket.per_micro_batch]]
            assert plan.micro_batch(number).utterances.tolist() == members.tolist()

    def test_of_several_change_from_one_epoch_to_the_next(self) -> None:
        plan = make_plan(varied(3000), series_length=4)
        assert plan.series_length == 4
        first, second = (
            [
                frozenset(u for batch in batches[start : start + 4] for u in batch.utterances.tolist())
                for start in range(0, len(batches), 4)
            ]
            for batches in (epoch(plan, 0), epoch(plan, 1))
        )
        assert len(set(first) & set(second)) < len(first) / 10


class TestPaddingAndLargest:
    @given(cases())
    def test_padding_is_what_epoch_0_pads(self, case: Case) -> None:
        batches = epoch(case.plan, 0)
        padded = sum(batch.utterances.size * batch.longest for batch in batches)
        audio = sum(int(batch.lengths.sum()) for batch in batches)
        assert case.plan.padding() == pytest.approx(1.0 - audio / padded, abs=1e-12)

    @given(cases())
    def test_largest_is_the_micro_batch_of_epoch_0_with_most_padded_samples(self, case: Case) -> None:
        padded = [batch.utterances.size * batch.longest for batch in epoch(case.plan, 0)]
        assert padded[case.plan.largest()] == max(padded)

    @given(cases())
    def test_longest_is_the_largest_micro_batch_of_the_bucket_with_the_longest_utterance(self, case: Case) -> None:
        bucket_of = case.bucket_of()
        first = {
            batch.number: batch.utterances.size * batch.longest
            for batch in epoch(case.plan, 0)
            if bucket_of[int(batch.utterances[0])] is case.plan.buckets[0]
        }
        assert first[case.plan.longest()] == max(first.values())

    @given(cases())
    def test_no_later_micro_batch_and_no_series_needs_more_memory(self, case: Case) -> None:
        """So copies of the largest micro-batch, which calibration measures, need at least as much as any forward."""
        plan, length = case.plan, case.plan.series_length
        full = max(bucket.per_micro_batch * bucket.longest for bucket in plan.buckets)
        if all(bucket.count >= bucket.per_micro_batch * bucket.micro_batches for bucket in plan.buckets):
            largest = plan.micro_batch(plan.largest())
            assert largest.utterances.size * largest.longest == full
        for number in (0, 1, 17):
            batches = epoch(plan, number)
            for start in range(0, len(batches), length):
                series = batches[start : start + length]
                widest = max(batch.longest for batch in series)
                assert sum(batch.utterances.size for batch in series) * widest <= length * full


class TestRanks:
    @given(cases(), st.sampled_from([0, 1, 17, 10**8]))
    @settings(max_examples=20)
    def test_windows_of_any_world_size_partition_the_same_micro_batches(self, case: Case, update: int) -> None:
        for world_size in (1, 2, 3, 4, 6, 12):
            windows = [
                rank_window(case.plan, update, micro_batches=12, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert {len(window) for window in windows} == {12 // world_size}
            dealt = sorted(number for window in windows for number in window)
            assert dealt == list(range(12 * update, 12 * update + 12))

    @given(cases(), st.integers(0, 50), st.sampled_from([1, 2, 3, 4, 6, 12]))
    def test_each_run_of_a_window_is_of_one_series_longest_first(self, case: Case, update: int, ranks: int) -> None:
        length = run_length(case.plan.series_length, per_rank=12 // ranks)
        for rank in range(ranks):
            window = rank_window(case.plan, update, micro_batches=12, rank=rank, world_size=ranks)
            for start in range(0, len(window), length):
                run = window[start : start + length]
                assert len({number // case.plan.series_length for number in run}) == 1
                longest = [case.plan.micro_batch(number).longest for number in run]
                assert longest == sorted(longest, reverse=True)

    @given(cases(), st.integers(0, 50), st.sampled_from([2, 3, 4, 6]))
    def test_in_each_sub_step_all_ranks_have_neighbours_in_length(self, case: Case, update: int, ranks: int) -> None:
        """Series are neighbours by their longest micro-batch."""
        plan, length = case.plan, case.plan.series_length

        def longest_of_series(number: int) -> int:
            first = number - number % length
            return max(plan.micro_batch(each).longest for each in range(first, first + length))

        windows = [rank_window(plan, update, micro_batches=12, rank=r, world_size=ranks) for r in range(ranks)]
        runs = [window[:: run_length(length, per_rank=12 // ranks)] for window in windows]
        steps = list(zip(*[map(longest_of_series, run) for run in runs], strict=True))
        for now, then in pairwise(steps):
            assert min(now) >= max(then)

    @pytest.mark.parametrize(("series_length", "expected"), [(1, 1), (4, 2), (12, 6)])
    def test_a_larger_world_runs_what_a_smaller_one_runs_in_the_same_update(
        self, series_length: int, expected: int
    ) -> None:
        plan = make_plan(varied(3000), series_length=series_length)
        assert plan.series_length == series_length
        length = run_length(series_length, per_rank=6)
        assert length == expected
        alone = rank_window(plan, 5, micro_batches=12, rank=0, world_size=1)
        pairs = [rank_window(plan, 5, micro_batches=12, rank=r, world_size=2) for r in (0, 1)]
        runs = [[window[start : start + length] for start in range(0, 6, length)] for window in pairs]
        assert alone == [number for pair in zip(*runs, strict=True) for run in pair for number in run]

    def test_one_micro_batch_an_update_is_its_own_window(self) -> None:
        assert rank_window(make_plan(varied()), 7, micro_batches=1, rank=0, world_size=1) == [7]

    @given(cases(), st.integers(0, 10**6))
    def test_lengths_are_those_of_the_micro_batch(self, case: Case, number: int) -> None:
        assert case.plan.lengths(number).tolist() == case.plan.micro_batch(number).lengths.tolist()


def test_the_largest_divisor() -> None:
    assert [largest_divisor(64, at_most=limit) for limit in (1, 7, 8, 100)] == [1, 4, 8, 64]
    assert [largest_divisor(7, at_most=limit) for limit in (1, 6, 7)] == [1, 1, 7]


@pytest.mark.parametrize(
    ("micro_batches", "same_bucket", "expected"),
    [
        (64, 8, 8),
        (64, 7, 4),
        (128, 8, 8),
        (16, 8, 4),
        (8, 8, 2),
        (4, 8, 1),
        (1, 8, 1),
        (36, 8, 6),
        (37, 8, 1),
        (64, 1, 1),
    ],
)
def test_an_update_has_at_least_four_series(micro_batches: int, same_bucket: int, expected: int) -> None:
    assert length_of_series(BatchConfig(micro_batches=micro_batches, same_bucket=same_bucket)) == expected


class TestSeeking:
    @given(cases(), st.integers(0, 10**9))
    def test_a_fresh_plan_gives_at_any_position_what_one_that_came_there_gives(self, case: Case, first: int) -> None:
        walked = [case.plan.micro_batch(number) for number in range(first, first + 20)]
        again = case.again()
        assert key(again.micro_batch(first + 19)) == key(walked[-1])
        assert [key(again.micro_batch(batch.number)) for batch in reversed(walked)] == [key(b) for b in walked[::-1]]

    def test_a_far_position_draws_no_more_than_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[object, ...]] = []
        original = plan_module.generator
        monkeypatch.setattr(plan_module, "generator", lambda *given: calls.append(given) or original(*given))
        counts = []
        for number in (0, 10**9, 10**15):
            calls.clear()
            make_plan(varied()).micro_batch(number)
            counts.append(len(calls))
        assert counts == [3, 3, 3]  # the epoch's order, the bucket's order, the crops

    def test_memory_does_not_grow_with_the_position(self) -> None:
        plan = make_plan(varied())
        for number in range(0, 200 * plan.per_epoch, 7):
            plan.micro_batch(number)
        # At most two orders of the epoch and of each bucket.
        assert plan._order.cache_info().currsize <= 2 * (1 + len(plan.buckets))


class TestPurity:
    @given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
    def test_two_plans_of_the_same_arguments_agree(self, seed: int, number: int) -> None:
        one, other = make_plan(varied(), seed=seed), make_plan(varied(), seed=seed)
        assert key(one.micro_batch(number)) == key(other.micro_batch(number))

    @given(cases())
    def test_pickling_changes_nothing(self, case: Case) -> None:
        plan = case.plan
        plan.micro_batch(0)
        again = pickle.loads(pickle.dumps(plan))
        assert [key(batch) for batch in epoch(plan, 1)] == [key(batch) for batch in epoch(again, 1)]
        assert (again.per_epoch, again.largest(), again.padding()) == (plan.per_epoch, plan.largest(), plan.padding())

    def test_another_seed_gives_another_order_and_other_crops(self) -> None:
        one, other = make_plan(varied(), seed=1), make_plan(varied(), seed=2)
        assert [key(batch) for batch in epoch(one, 0)] != [key(batch) for batch in epoch(other, 0)]
        alike = np.full(8, 2 * MAX_SAMPLES, dtype=np.int64)
        crops = [np.concatenate([b.offsets for b in epoch(make_plan(alike, seed=s), 0)]) for s in (1, 2)]
        assert (crops[0] != crops[1]).any()

    def test_the_corpus_is_not_changed(self) -> None:
        samples = varied()
        before = samples.copy()
        epoch(make_plan(samples), 0)
        assert (samples == before).all()


class TestCorporaThatCannotBePlanned:
    @pytest.mark.parametrize("samples", [[], [1], [MIN_SAMPLES - 1] * 5])
    def test_no_utterance_long_enough_is_an_error_that_says_how_many_and_which_setting(
        self, samples: list[int]
    ) -> None:
        with pytest.raises(UserError, match=rf"none of the {len(samples)} .*{MIN_SAMPLES} samples.*data.min_seconds"):
            make_plan(np.array(samples, dtype=np.int64))

    def test_one_utterance_is_enough(self) -> None:
        plan = make_plan(np.array([MIN_SAMPLES], dtype=np.int64))
        assert plan.per_epoch == 1
        assert plan.micro_batch(10**6).utterances.tolist() == [0]
