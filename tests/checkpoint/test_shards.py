"""Whether shards make a whole tensor."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.checkpoint.shards import Shard, StoredTensor

FILE = Path("shard-00001-model-00001-of-00001.safetensors")


def shard(offsets: tuple[int, ...], shape: tuple[int, ...]) -> Shard:
    return Shard(FILE, "F32", offsets, shape)


def rows(counts: list[int], width: int = 3) -> list[Shard]:
    """Blocks of rows, one after the other."""
    return [shard((sum(counts[:number]), 0), (count, width)) for number, count in enumerate(counts)]


def values(one: Shard) -> set[tuple[int, ...]]:
    """The places in the whole tensor that a shard has a value for."""
    return set(product(*(range(start, end) for start, end in zip(one.offsets, one.ends, strict=True))))


blocks = st.integers(0, 3).flatmap(
    lambda dimensions: st.lists(
        st.tuples(st.tuples(*[st.integers(0, 3)] * dimensions), st.tuples(*[st.integers(0, 3)] * dimensions)).map(
            lambda block: shard(*block)
        ),
        min_size=1,
        max_size=6,
    )
)


@given(blocks)
def test_a_fault_is_what_counting_every_value_finds(shards: list[Shard]) -> None:
    found = StoredTensor(tuple(shards)).fault()
    if any(values(one) & values(other) for one, other in combinations(shards, 2)):
        assert found == "its shards overlap"
    elif sum(len(values(one)) for one in shards) < math.prod(StoredTensor(tuple(shards)).shape):
        assert found == "its shards leave out a part of it"
    else:
        assert found is None


def test_rows_in_any_order_and_empty_blocks_are_whole() -> None:
    assert StoredTensor(tuple(reversed(rows([2, 2, 1, 0, 0])))).fault() is None


@pytest.mark.parametrize(
    ("shards", "fault"),
    [
        ([*rows([2, 2]), shard((1, 0), (1, 3))], "its shards overlap"),
        ([*rows([2, 2]), *rows([2])], "its shards overlap"),
        (rows([2, 2, 2])[::2], "its shards leave out a part of it"),
        (rows([2, 2])[1:], "its shards leave out a part of it"),
        ([shard((), ()), shard((), ())], "its shards overlap"),
    ],
)
def test_what_is_not_whole(shards: list[Shard], fault: str) -> None:
    assert StoredTensor(tuple(shards)).fault() == fault


def test_rows_of_a_thousand_ranks_are_not_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "overlaps", lambda *pair: pytest.fail("compared"))
    assert StoredTensor(tuple(rows([1] * 1000))).fault() is None
