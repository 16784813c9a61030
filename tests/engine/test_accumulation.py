"""Which micro-batches share a forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.helpers.batches import inputs_of
from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.accumulation import Capacity, FittingGrouping, FixedGrouping
from w2vscale.objectives import build_objective

OBJECTIVE = build_objective(load_config("base", list(MICRO_MODEL)))


def micro_batches(*shapes: tuple[int, int]) -> list[MicroBatch]:
    found = []
    for number, (rows, width) in enumerate(shapes):
        inputs = inputs_of(OBJECTIVE, [np.zeros(width, dtype=np.float32)] * rows, number=number)
        found.append(MicroBatch(number, inputs, rows * width))
    return found


def numbers(groups: Sequence[Sequence[MicroBatch]]) -> list[list[int]]:
    return [[batch.number for batch in group] for group in groups]


def test_a_fixed_number() -> None:
    window = micro_batches(*[(1, 8000)] * 5)
    assert numbers(FixedGrouping(2).groups(window)) == [[0, 1], [2, 3], [4]]
    assert numbers(FixedGrouping(1).groups(window)) == [[0], [1], [2], [3], [4]]


class TestFitting:
    def test_as_many_as_fit(self) -> None:
        window = micro_batches(*[(2, 8000)] * 7)
        assert numbers(FittingGrouping((Capacity(8000, 50_000),)).groups(window)) == [[0, 1, 2], [3, 4, 5], [6]]

    def test_what_is_larger_than_that_runs_alone(self) -> None:
        window = micro_batches((2, 8000), (1, 8000), (1, 8000))
        assert numbers(FittingGrouping((Capacity(8000, 9000),)).groups(window)) == [[0], [1], [2]]

    def test_what_would_add_padding_is_left_apart(self) -> None:
        window = micro_batches((2, 12_000), (2, 11_900), (4, 6000), (4, 5990))
        assert numbers(FittingGrouping((Capacity(12_000, 10**6),)).groups(window)) == [[0, 1], [2, 3]]

    def test_the_capacity_is_that_of_the_next_longer_utterances(self) -> None:
        rule = FittingGrouping((Capacity(12_000, 24_000), Capacity(8000, 32_000), Capacity(6000, 36_000)))
        assert numbers(rule.groups(micro_batches(*[(1, 12_000)] * 3))) == [[0, 1], [2]]
        assert numbers(rule.groups(micro_batches(*[(1, 8000)] * 5))) == [[0, 1, 2, 3], [4]]
        assert numbers(rule.groups(micro_batches(*[(1, 7000)] * 5))) == [[0, 1, 2, 3], [4]]
        assert numbers(rule.groups(micro_batches(*[(1, 5900)] * 8))) == [[0, 1, 2, 3, 4, 5], [6, 7]]
        # Longer than any that was measured.
        assert numbers(rule.groups(micro_batches(*[(1, 13_000)] * 2))) == [[0], [1]]
