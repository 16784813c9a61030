"""Every property of the plan of a stream, for shards that hypothesis makes up."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from w2vscale.data.plan import PlannedMicroBatch
from w2vscale.data.stream_plan import Share, StreamPlan
from w2vscale.errors import UserError

MAX_SAMPLES = 100
MIN_SAMPLES = 10


@dataclass(frozen=True)
class Case:
    """The utterances of shards, the settings that they are planned with, and their plan."""

    samples: NDArray[np.int64]
    starts: NDArray[np.int64]
    settings: dict[str, int]
    plan: StreamPlan

    @property
    def kept(self) -> set[int]:
        return set(np.flatnonzero(self.samples >= MIN_SAMPLES).tolist())

    def shards_of(self, numbers: list[int]) -> NDArray[np.int64]:
        """The shards of the utterances of micro-batches."""
        utterances = np.concatenate([self.plan.micro_batch(number).utterances for number in numbers])
        return np.unique(np.searchsorted(self.starts, utterances, side="right") - 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 30 shards of 0 to 40 utterances, of few or many different lengths."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    sizes[draw(st.integers(0, len(sizes) - 1))] += 1
    longest = draw(st.sampled_from([MIN_SAMPLES, 12, 2 * MAX_SAMPLES]))
    samples = np.random.default_rng(draw(st.integers(0, 999))).integers(1, longest + 1, size=sum(sizes))
    samples[draw(st.integers(0, sum(sizes) - 1))] = draw(st.integers(MIN_SAMPLES, longest))
    series_length = draw(st.sampled_from([1, 2, 3, 4, 6]))
    settings = {
        "block_size": draw(st.sampled_from([1, 7, 30, 100, 10_000])),
        "budget_samples": draw(st.sampled_from([MAX_SAMPLES, 150, 999])),
        "buckets": draw(st.sampled_from([1, 3, 64])),
        "series_length": series_length,
        "micro_batches": series_length * draw(st.sampled_from([1, 2, 3, 4, 8])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    return case_of(samples, sizes, settings)


def case_of(samples: NDArray[np.int64], sizes: list[int], settings: dict[str, int]) -> Case:
    starts = np.cumsum([0, *sizes])
    return Case(samples, starts, settings, plan_of(samples, starts, **settings))


def plan_of(samples: NDArray[np.int64], starts: NDArray[np.int64], **settings: Any) -> StreamPlan:
    return StreamPlan(samples, starts, max_samples=MAX_SAMPLES, min_samples=MIN_SAMPLES, **settings)


def regular(shards: int, *, size: int = 50, **changes: int) -> Case:
    """Shards of equal size, and blocks that hold one of them."""
    samples = np.random.default_rng(0).integers(MIN_SAMPLES, MAX_SAMPLES, size=shards * size)
    settings = {"block_size": 50, "budget_samples": 400, "buckets": 4, "series_length": 2, "micro_batches": 8}
    return case_of(samples, [size] * shards, {**settings, "seed": 3, **changes})


def epoch(plan: StreamPlan, number: int) -> list[PlannedMicroBatch]:
    return [plan.micro_batch(number * plan.per_epoch + i) for i in range(plan.per_epoch)]


def key(batch: PlannedMicroBatch) -> tuple[int, int, bytes, bytes, bytes]:
    return batch.number, batch.epoch, batch.utterances.tobytes(), batch.offsets.tobytes(), batch.lengths.tobytes()


class TestEpochs:
    @given(cases())
    def test_every_kept_utterance_appears_exactly_once_in_each(self, case: Case) -> None:
        assert (len(case.plan), case.plan.left_out) == (len(case.kept), case.samples.size - len(case.kept))
        for number in (0, 1, 1000):
            found = Counter(int(u) for batch in epoch(case.plan, number) for u in batch.utterances)
            assert set(found) == case.kept
            assert set(found.values()) == {1}

    @given(cases())
    def test_micro_batches_fit_the_budget_and_none_is_empty(self, case: Case) -> None:
        for batch in epoch(case.plan, 1):
            assert 0 < batch.longest * batch.utterances.size <= case.settings["budget_samples"]
            samples = case.samples[batch.utterances]
            assert (batch.lengths == np.minimum(samples, MAX_SAMPLES)).all()
            assert (batch.offsets >= 0).all() and (batch.offsets + batch.lengths <= samples).all()
            assert np.array_equal(batch.lengths, case.plan.lengths(batch.number))

    @given(cases())
    def test_a_micro_batch_does_not_depend_on_those_before(self, case: Case) -> None:
        numbers = [*range(0, 3 * case.plan.per_epoch, 5), 10**9]
        here = [key(case.plan.micro_batch(number)) for number in numbers]
        for number, expected in zip(reversed(numbers), reversed(here), strict=True):
            again = plan_of(case.samples, case.starts, **case.settings)
            assert key(again.micro_batch(number)) == expected

    @given(cases())
    def test_series_are_whole_and_add_at_most_a_twentieth(self, case: Case) -> None:
        plan, wanted = case.plan, case.settings["series_length"]
        assert wanted % plan.series_length == 0
        assert plan.per_epoch % plan.series_length == 0
        assert plan.lanes * plan.series_length == case.settings["micro_batches"]
        if plan.series_length > 1 and case.settings["buckets"] == 1:  # else series have other borders of buckets
            alone = plan_of(case.samples, case.starts, **{**case.settings, "series_length": 1})
            assert plan.per_epoch - alone.per_epoch <= 0.05 * plan.per_epoch + 1e-9 or wanted == 1

    def test_the_order_and_the_crops_change_from_one_to_the_next(self) -> None:
        case = regular(12)
        first, second = ([set(batch.utterances.tolist()) for batch in epoch(case.plan, n)] for n in (0, 1))
        assert sum(one in second for one in first) < len(first) / 10
        shards = [case.shards_of([n])[0] for n in (0, case.plan.per_epoch)]
        assert case.shards_of([0]).size == 1 and shards[0] != shards[1]

    def test_another_seed_gives_another_order(self) -> None:
        one, other = (epoch(regular(6, seed=seed).plan, 0) for seed in (3, 4))
        assert [key(batch) for batch in one] != [key(batch) for batch in other]


class TestBlocks:
    @given(cases())
    def test_what_is_read_together_partitions_an_epoch(self, case: Case) -> None:
        plan = case.plan
        for number in (0, 7):
            first = number * plan.per_epoch
            seen: list[int] = []
            for k in range(first, first + plan.per_epoch):
                together = plan.together(k)
                assert k in together and (np.diff(together) > 0).all()
                if together[0] == k:
                    seen += together.tolist()
            assert sorted(seen) == list(range(first, first + plan.per_epoch))

    @given(cases())
    def test_at_most_a_block_is_read_together_and_from_consecutive_micro_batches_of_a_lane(self, case: Case) -> None:
        plan = case.plan
        for k in range(0, plan.per_epoch, 3):
            together = plan.together(k)
            utterances = sum(plan.micro_batch(number).utterances.size for number in together.tolist())
            assert utterances <= case.settings["block_size"]
            series = np.unique(together // plan.series_length)
            assert (np.diff(series) == plan.lanes).all()

    @given(cases(), st.integers(1, 4))
    def test_all_processes_together_hold_at_most_a_block_per_lane(self, case: Case, processes: int) -> None:
        plan, size = case.plan, case.settings["micro_batches"]
        waiting: dict[int, int] = {}
        shares = [
            Share(range(2 + 2 * plan.per_epoch // size), size, process=process, processes=processes)
            for process in range(processes)
        ]
        for number, share in zip(merged(shares), shares * plan.per_epoch, strict=False):
            if number not in waiting:
                for each in share.among(plan.together(number)).tolist():
                    waiting[each] = plan.micro_batch(each).utterances.size
            assert sum(waiting.values()) <= plan.lanes * case.settings["block_size"]
            del waiting[number]

    def test_a_shard_that_is_cut_is_read_from_its_beginning_to_its_end(self) -> None:
        case = regular(5, size=170)
        for number in (0, 1, 2):
            parts: dict[int, list[int]] = {}
            for k in sorted(range(number * case.plan.per_epoch, (number + 1) * case.plan.per_epoch), key=lane_of(case)):
                for utterance in case.plan.micro_batch(k).utterances.tolist():
                    parts.setdefault(utterance // 170, []).append(utterance % 170)
            for members in parts.values():
                blocks = [members[start : start + 170 // 4] for start in range(0, 170, 170 // 4)][:3]
                means = [np.mean(block) for block in blocks]
                # A lane may end in a shard; then the next lane has its beginning, an epoch earlier.
                assert sum(one > other for one, other in pairwise(means)) <= 1
            assert sum(members[0] < 43 for members in parts.values()) >= 1

    def test_small_shards_share_a_block(self) -> None:
        case = regular(40, size=10)
        first = case.plan.together(0).tolist()
        assert 1 < case.shards_of(first).size <= 6

    @pytest.mark.parametrize("last", [1, 3, 20])
    def test_a_small_last_shard_does_not_shorten_series(self, last: int) -> None:
        sizes = [400] * 20 + [last]
        samples = np.random.default_rng(0).integers(MIN_SAMPLES, MAX_SAMPLES, size=sum(sizes))
        settings = {**regular(1).settings, "series_length": 4, "block_size": 400}
        assert case_of(samples, sizes, settings).plan.series_length == 4


def merged(shares: list[Share]) -> list[int]:
    """The micro-batches of processes as a DataLoader takes them: from each in turn."""
    parts = [list(share) for share in shares]
    return [part[turn] for turn in range(max(map(len, parts))) for part in parts if turn < len(part)]


def lane_of(case: Case) -> Any:
    return lambda number: (case.plan._locate(number).lane, number)


class TestShares:
    @given(st.integers(0, 50), st.integers(0, 6), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 7]))
    def test_ranks_and_processes_have_every_micro_batch_of_an_update_once(
        self, first: int, updates: int, ranks: int, processes: int
    ) -> None:
        window = range(first, first + updates)
        found = []
        for rank in range(ranks):
            shares = [Share(window, 12, rank, ranks, process, processes) for process in range(processes)]
            mine = merged(shares)
            assert mine == sorted(mine)
            per_update = [number // 12 for number in mine]
            assert per_update == sorted(list(window) * (12 // ranks))
            found += mine
        assert sorted(found) == list(range(12 * first, 12 * (first + updates)))

    @given(st.integers(0, 9), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 5]))
    def test_a_share_knows_its_micro_batches_among_others(self, first: int, ranks: int, processes: int) -> None:
        for rank in range(ranks):
            for process in range(processes):
                share = Share(range(first, first + 4), 6, rank, ranks, process, processes)
                assert share.among(np.arange(200)).tolist() == list(share)

    def test_ranks_have_lanes_of_their_own_if_their_number_divides_them(self) -> None:
        case = regular(12)
        assert case.plan.lanes == 4
        for ranks in (2, 4):
            lanes = [
                {case.plan._locate(k).lane for k in Share(range(case.plan.per_epoch // 8), 8, rank, ranks)}
                for rank in range(ranks)
            ]
            assert [len(each) for each in lanes] == [4 // ranks] * ranks
            assert len(set.union(*lanes)) == 4


class TestExamples:
    @given(cases())
    def test_the_largest_and_the_longest_are_in_epoch_0(self, case: Case) -> None:
        plan = case.plan
        assert plan.micro_batch(plan.longest()).epoch == plan.micro_batch(plan.largest()).epoch == 0

    @pytest.mark.parametrize("seed", range(5))
    def test_the_largest_has_nearly_the_most_padded_samples(self, seed: int) -> None:
        plan = regular(20, seed=seed).plan
        padded = [batch.longest * batch.utterances.size for batch in epoch(plan, 0)]
        largest = plan.micro_batch(plan.largest())
        assert largest.longest * largest.utterances.size >= 0.97 * max(padded)

    def test_the_longest_has_a_longest_utterance(self) -> None:
        plan = regular(20).plan
        bucket = plan.micro_batch(plan.longest()).lengths
        assert bucket.max() >= 0.9 * max(batch.longest for batch in epoch(plan, 0))


def test_no_utterance_is_long_enough() -> None:
    with pytest.raises(UserError, match=r"none of the 5 lasts 10 samples \(data.min_seconds\); the longest lasts 9"):
        plan_of(np.full(5, 9), np.array([0, 5]), **regular(1).settings)


def test_a_plan_can_be_sent_to_another_process() -> None:
    plan = regular(6).plan
    expected = key(plan.micro_batch(77))
    assert key(pickle.loads(pickle.dumps(plan)).micro_batch(77)) == expected


def test_a_million_utterances_open_and_seek() -> None:
    samples = np.random.default_rng(0).integers(MIN_SAMPLES, MAX_SAMPLES, size=1_000_000)
    settings = {**regular(1).settings, "block_size": 1000, "budget_samples": 600, "series_length": 8}
    plan = plan_of(samples, np.arange(0, 1_000_001, 1000), **{**settings, "micro_batches": 64})
    assert plan.series_length == 8
    assert plan.micro_batch(10**12).utterances.size > 0
