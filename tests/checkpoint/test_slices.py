"""Whether slices make a whole tensor."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.checkpoint import slices as slices_module
from w2vscale.checkpoint.slices import Block, StoredTensor, TensorSlice, block_at, intersection

FILE = Path("shard-00001-model-00001-of-00001.safetensors")


def part(offsets: tuple[int, ...], shape: tuple[int, ...]) -> TensorSlice:
    return TensorSlice(FILE, torch.float32, block_at(offsets, shape))


def split(counts: list[int], width: int = 3) -> list[TensorSlice]:
    """A matrix split along its first dimension into slices of these lengths."""
    return [part((sum(counts[:number]), 0), (count, width)) for number, count in enumerate(counts)]


def values(one: TensorSlice) -> set[tuple[int, ...]]:
    """The places in the whole tensor that a slice has a value for."""
    return set(product(*one.block))


blocks = st.integers(0, 3).flatmap(
    lambda dimensions: st.lists(
        st.tuples(st.tuples(*[st.integers(0, 3)] * dimensions), st.tuples(*[st.integers(0, 3)] * dimensions)).map(
            lambda block: part(*block)
        ),
        min_size=1,
        max_size=6,
    )
)


@given(blocks)
def test_a_fault_is_what_counting_every_value_finds(slices: list[TensorSlice]) -> None:
    found = StoredTensor(slices).fault()
    if any(values(one) & values(other) for one, other in combinations(slices, 2)):
        assert found == "its slices overlap"
    elif sum(len(values(one)) for one in slices) < math.prod(StoredTensor(slices).spec.shape):
        assert found == "its slices leave a gap"
    else:
        assert found is None


def test_slices_in_any_order_and_empty_ones_are_whole() -> None:
    assert StoredTensor(split([2, 2, 1, 0, 0])[::-1]).fault() is None


@pytest.mark.parametrize(
    ("slices", "fault"),
    [
        ([*split([2, 2]), part((1, 0), (1, 3))], "its slices overlap"),
        ([*split([2, 2]), *split([2])], "its slices overlap"),
        (split([2, 2, 2])[::2], "its slices leave a gap"),
        (split([2, 2])[1:], "its slices leave a gap"),
        ([part((), ()), part((), ())], "its slices overlap"),
    ],
)
def test_what_is_not_whole(slices: list[TensorSlice], fault: str) -> None:
    assert StoredTensor(slices).fault() == fault


def test_the_slices_of_a_thousand_ranks_are_not_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Block] = []

    def counted(one: Block, other: Block) -> Block:
        compared.append(other)
        return intersection(one, other)

    monkeypatch.setattr(slices_module, "intersection", counted)
    assert StoredTensor(split([1] * 1000)).fault() is None
    assert len(compared) < 1000
