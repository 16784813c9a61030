"""How long collectives take: formulas for rings, trees and hierarchies, and clusters with stated link speeds.

Bytes are those of the whole tensor: the input of an all-reduce or reduce-scatter, the output of an all-gather.
Bandwidths are bytes per second in one direction, latencies seconds of one message. Sources of the formulas: Patarasuk
and Yuan 2009 (rings), Thakur, Rabenseifner and Gropp 2005 (trees), and doc/PERFORMANCE.md of NVIDIA's nccl-tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from w2vscale.planning.operations import Speeds

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Algorithm = Literal["ring", "tree", "hierarchical", "fastest"]
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical", "fastest")

GIGABIT = 1e9 / 8


class Link(NamedTuple):
    """A link as a straight line: seconds = latency + bytes / bandwidth."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. `inside`: the link of one GPU to the others of its node. `across`: all links of one node."""

    description: str
    gpus_per_node: int
    inside: Link
    across: Link
    flops: float  # what one GPU sustains in bf16 matrix products, per second
    memory: float  # of one GPU, bytes
    bandwidth: float = math.inf  # bytes of its memory that it reads or writes, per second
    pcie: float = math.inf  # bytes per second between one GPU and host memory
    host_bandwidth: float = 2e11  # bytes of host memory that all processes of a node read or write, per second
    host_memory: float = math.inf  # of one node, bytes

    @property
    def speeds(self) -> Speeds:
        """Speeds of one GPU."""
        return Speeds(self.flops, self.bandwidth)


EFFICIENCY = 0.8
"""Share of a link's nominal bandwidth that collectives reach. NCCL's tests of large messages give 0.75 to 0.95."""

NVLINK, INFINIBAND, ETHERNET = 3e-6, 8e-6, 30e-6
"""Seconds of one message: of the order of those in NCCL's own cost model, which adds what a step costs in software."""

H100 = Cluster(
    "8 × H100 80 GB, NVLink 4, 8 × 400 Gb/s InfiniBand per node",
    8,
    Link(450e9 * EFFICIENCY, NVLINK),
    Link(8 * 400 * GIGABIT * EFFICIENCY, INFINIBAND),
    flops=8e14,
    memory=80e9,
    bandwidth=3.0e12,
    pcie=64e9 * EFFICIENCY,
)

CLUSTERS = {
    "h100": H100,
    "h100_one_nic": replace(
        H100,
        description="8 × H100 80 GB, NVLink 4, one 400 Gb/s InfiniBand link per node",
        across=Link(400 * GIGABIT * EFFICIENCY, INFINIBAND),
    ),
    "a100": Cluster(
        "8 × A100 80 GB, NVLink 3, 8 × 200 Gb/s InfiniBand per node",
        8,
        Link(300e9 * EFFICIENCY, NVLINK),
        Link(8 * 200 * GIGABIT * EFFICIENCY, INFINIBAND),
        flops=2.5e14,
        bandwidth=1.6e12,
        memory=80e9,
        pcie=32e9 * EFFICIENCY,
    ),
    "cloud": replace(
        H100,
        description="8 × H100 80 GB, NVLink 4, 25 Gb/s Ethernet per node",
        across=Link(25 * GIGABIT * EFFICIENCY, ETHERNET),
    ),
}
"""Nominal speeds are the vendors'. `flops` (bf16 matrix products) and `bandwidth` are 80 % of them; those of an H100
were measured (docs/performance.md). The bandwidth of host memory is assumed."""


def changed(cluster: Cluster, *, gpus_per_node: int | None, inside: float | None, across: float | None) -> Cluster:
    """Return the cluster with other numbers: GPUs of a node, nominal GB/s of a GPU inside, nominal Gb/s of a node."""
    changes: dict[str, Any] = {}
    if gpus_per_node is not None:
        changes["gpus_per_node"] = gpus_per_node
    if inside is not None:
        changes["inside"] = cluster.inside._replace(bandwidth=inside * 1e9 * EFFICIENCY)
    if across is not None:
        changes["across"] = cluster.across._replace(bandwidth=across * GIGABIT * EFFICIENCY)
    if changes:
        given = {"GPUs per node": gpus_per_node, "GB/s inside": inside, "Gb/s across": across}
        numbers = ", ".join(f"{value:g} {name}" for name, value in given.items() if value is not None)
        changes["description"] = f"{cluster.description}, changed to {numbers}"
    return replace(cluster, **changes)


class Group(NamedTuple):
    """The ranks of a collective: how many, and how many of them share a node. Equal on all nodes.

    `share`: the part of a node's links that one group has, where other ranks form groups that talk at the same time.
    """

    size: int
    per_node: int
    share: float = 1.0

    @property
    def nodes(self) -> int:
        """On how many nodes it is."""
        return self.size // self.per_node


def whole_group(ranks: int, cluster: Cluster) -> Group:
    """All ranks, which fill nodes one after the other."""
    return Group(ranks, min(ranks, cluster.gpus_per_node))


def shard_group(ranks: int, shard_size: int, cluster: Cluster) -> Group:
    """Ranks that share one copy of the model, with hybrid sharding: `shard_size` neighbours."""
    per_node = min(ranks, cluster.gpus_per_node)
    inside = min(shard_size, per_node)
    return Group(shard_size, inside, inside / per_node)


def replica_group(ranks: int, shard_size: int, cluster: Cluster) -> Group:
    """Ranks that hold the same shard: every `shard_size`-th."""
    per_node = min(ranks, cluster.gpus_per_node)
    inside = max(per_node // shard_size, 1)
    return Group(ranks // shard_size, inside, inside / per_node)


def collective_seconds(kind: Kind, size: float, group: Group, cluster: Cluster, algorithm: Algorithm) -> float:
    """Seconds of a collective over `size` bytes. `fastest`: the best of the three, as NCCL chooses by a cost model."""
    if group.size == 1:
        return 0.0
    across = Link(cluster.across.bandwidth * group.share, cluster.across.latency)
    formulas = {"ring": ring, "tree": tree, "hierarchical": hierarchical}
    chosen = formulas.values() if algorithm == "fastest" else [formulas[algorithm]]
    return min(formula(kind, size, group, cluster.inside, across) for formula in chosen)


def passes(kind: Kind) -> int:
    """How often the data goes round: an all-reduce is a reduce-scatter and an all-gather."""
    return 2 if kind == "all_reduce" else 1


def ring(kind: Kind, size: float, group: Group, inside: Link, across: Link) -> float:
    """p · ((n - 1)/n · size / bandwidth + latencies of n - 1 hops), with p passes, n ranks and the slowest link.

    Of the hops, nodes - 1 lead to another node. A node's links carry one ring each, so that a GPU's data use them all.
    """
    n = group.size
    bandwidth = inside.bandwidth if group.nodes == 1 else min(inside.bandwidth, across.bandwidth)
    hops = (group.nodes - 1) * across.latency + (n - group.nodes) * inside.latency
    return passes(kind) * ((n - 1) / n * size / bandwidth + hops)


def tree(kind: Kind, size: float, group: Group, inside: Link, across: Link) -> float:
    """As `ring`, with log2 of the ranks hops: recursive halving and doubling; for an all-reduce NCCL's double tree."""
    n = group.size
    bandwidth = inside.bandwidth if group.nodes == 1 else min(inside.bandwidth, across.bandwidth)
    hops = math.ceil(math.log2(group.nodes)) * across.latency + math.ceil(math.log2(group.per_node)) * inside.latency
    sent = 2 * size if kind == "all_reduce" and group.nodes > 1 else passes(kind) * (n - 1) / n * size
    return sent / bandwidth + passes(kind) * hops


def hierarchical(kind: Kind, size: float, group: Group, inside: Link, across: Link) -> float:
    """Rings inside the nodes, and rings across them that carry the k-th part of the data each (k ranks of a node)."""
    own = Link(across.bandwidth / group.per_node, across.latency)
    one_node, one_per_node = Group(group.per_node, group.per_node), Group(group.nodes, 1)
    inner = ring(kind, size, one_node, inside, across)
    if group.nodes == 1:
        return inner
    return inner + ring(kind, size / group.per_node, one_per_node, Link(math.inf, 0.0), own)
