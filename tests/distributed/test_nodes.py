"""How many processes each machine has, from the places of all ranks."""

from __future__ import annotations

import pytest

from w2vscale.distributed.nodes import Place, node_size
from w2vscale.errors import UserError


def block(nodes: int, processes: int) -> list[Place]:
    return [Place(f"node{node}", process, processes) for node in range(nodes) for process in range(processes)]


@pytest.mark.parametrize(("nodes", "processes"), [(4, 8), (1, 4), (3, 1)])
def test_consecutive_ranks_of_a_machine(nodes: int, processes: int) -> None:
    assert node_size(block(nodes, processes), "shard_size=node") == processes


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert node_size([Place("node0", 0, None)], "shard_size=node") == 1


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([Place("a", 0, None), Place("a", 1, None)], "the launcher does not say how many processes each machine has"),
        ([*block(1, 4), *block(1, 3)], "the machines have different numbers of processes"),
        ([*block(2, 4), *block(1, 3)[:2]], "the machines have different numbers of processes"),
        ([Place("a", 0, 4), Place("a", 1, 4), Place("b", 0, 4)], "the machines have different numbers of processes"),
        ([Place("a", 0, 2), Place("b", 0, 2), Place("a", 1, 2), Place("b", 1, 2)], "rank 1 is process 0 of b: the"),
        ([Place("a", 0, 2), Place("b", 1, 2), Place("b", 0, 2), Place("a", 1, 2)], "rank 1 is process 1 of b: the"),
    ],
)  # fmt: skip
def test_other_places_are_one_line(places: list[Place], message: str) -> None:
    with pytest.raises(UserError) as caught:
        node_size(places, "shard_size=node")
    assert str(caught.value).startswith(f"shard_size=node: {message}") and "\n" not in str(caught.value)
