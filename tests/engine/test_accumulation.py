"""Which micro-batches share a forward."""

from __future__ import annotations

from typing import Any

import pytest

from w2vscale.engine.accumulation import split


@pytest.mark.parametrize(
    ("per_forward", "expected"),
    [(1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (5, [[0, 1, 2, 3, 4]]), (8, [[0, 1, 2, 3, 4]])],
)
def test_consecutive_micro_batches_share_a_forward(per_forward: int, expected: list[list[int]]) -> None:
    window: Any = [0, 1, 2, 3, 4]
    assert split(window, per_forward) == expected
