"""Seconds of an update on many GPUs, and what follows: audio per second, days and GPU-hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from w2vscale.planning.links import (
    Algorithm,
    Cluster,
    Group,
    collective_seconds,
    passes,
    replica_group,
    shard_group,
    whole_group,
)
from w2vscale.planning.offload import offloading
from w2vscale.planning.rates import Rates
from w2vscale.planning.traffic import NCCL, Backend, Pace, Sharding, Task, ends, update_of
from w2vscale.planning.work import Model

AGREEMENT_HOP = 50e-6
"""Seconds that a message of gloo takes from host to host. Hosts agree on each update by an all-reduce of 64 bytes."""

MOST_FORWARDS = 200
"""Per update whose tasks are placed one by one."""


@dataclass(frozen=True)
class Setting:
    """Where and how an engine runs."""

    cluster: Cluster
    algorithm: Algorithm
    rates: Rates
    backend: Backend = NCCL


@dataclass(frozen=True)
class Prediction:
    """One update on `ranks` GPUs, of `micro_batches` on each."""

    model: Model
    sharding: Sharding
    micro_batches: int
    seconds: float
    computing: float  # seconds of the device
    stepping: float  # seconds of the optimizer step, which `computing` includes
    host: float  # seconds in which the hosts agree and launch; the update takes at least as long
    per_forward: int  # micro-batches that share a forward; 0: not even one fits into the memory
    sent: float  # bytes that each GPU sends
    sending: float  # seconds of all collectives, also of those that overlap with computing

    @property
    def fits(self) -> bool:
        """Whether a micro-batch fits."""
        return self.per_forward > 0

    @property
    def ranks(self) -> int:
        """Number of GPUs."""
        return self.sharding.ranks

    @property
    def exposed(self) -> float:
        """The part of the update in which a device waits for others or for its host."""
        return 1 - self.computing / self.seconds

    @property
    def audio_per_second(self) -> float:
        """Seconds of audio that all GPUs train on in one second."""
        return self.ranks * self.micro_batches * self.model.micro_batch_seconds / self.seconds

    @property
    def days(self) -> float:
        """Days of training, of as many updates as the preset has."""
        return self.seconds * self.model.config.trainer.updates / 86400

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return 24 * self.days * self.ranks


def predict(model: Model, sharding: Sharding, micro_batches: int, *, per_forward: int, setting: Setting) -> Prediction:
    """Predict one update of `micro_batches` per GPU, of which `per_forward` share a forward."""
    cluster, rates = setting.cluster, setting.rates
    forwards = -(-micro_batches // max(per_forward, 1))
    audio = micro_batches * model.micro_batch_seconds
    device = audio * model.flops / rates.flops / forwards
    copies = offloading(model, sharding, forwards, cluster)
    step = rates.step * model.parameters if copies.step is None else copies.step
    # A backward has twice the products of its forward.
    pace = Pace(device / 3 + copies.forward, device * 2 / 3 + copies.backward, step)
    links = network(sharding, cluster, setting.algorithm, setting.backend)

    def totals(forwards: int) -> tuple[float, ...]:
        """Seconds of the update, of computing, of its optimizer step and of collectives, and bytes sent."""
        tasks = update_of(model, sharding, forwards=forwards, pace=pace, backend=setting.backend)
        collectives = [task for task in tasks if task.kind is not None]
        return (
            max(ends(tasks, links)),
            sum(task.seconds for task in tasks),
            next(task.seconds for task in reversed(tasks) if task.kind is None),
            sum(map(links, collectives)),
            sum(sent(task, sharding) for task in collectives),
        )

    found = totals(min(forwards, MOST_FORWARDS))
    if forwards > MOST_FORWARDS:  # each more adds as much as the last one
        before = totals(MOST_FORWARDS - 1)
        found = tuple(b + (forwards - MOST_FORWARDS) * (b - a) for a, b in zip(before, found, strict=True))
    seconds, computing, stepping, sending, size = found
    fixed, per_layer = rates.host
    host = forwards * (fixed + per_layer * model.config.model.layers) + 2 * (sharding.ranks - 1) * AGREEMENT_HOP
    return Prediction(
        model,
        sharding,
        micro_batches,
        seconds=max(seconds, host),
        computing=computing,
        stepping=stepping,
        host=host,
        per_forward=per_forward,
        sent=size,
        sending=sending,
    )


def sent(task: Task, sharding: Sharding) -> float:
    """Bytes that each rank sends in a collective, by a ring."""
    assert task.kind is not None
    size = {"all": sharding.ranks, "shard": sharding.shard_size}.get(task.resource)
    size = sharding.ranks // sharding.shard_size if size is None else size
    return passes(task.kind) * (size - 1) / size * task.size


def network(sharding: Sharding, cluster: Cluster, algorithm: Algorithm, backend: Backend) -> Callable[[Task], float]:
    """Seconds of a task's collective."""
    groups: dict[str, Group] = {
        "all": whole_group(sharding.ranks, cluster),
        "shard": shard_group(sharding.ranks, sharding.shard_size, cluster),
        "replicate": replica_group(sharding.ranks, sharding.shard_size, cluster),
    }

    def seconds(task: Task) -> float:
        assert task.kind is not None
        kind = "all_reduce" if task.kind == "reduce_scatter" and not backend.scatters else task.kind
        return collective_seconds(kind, task.size, groups[task.resource], cluster, algorithm)

    return seconds
