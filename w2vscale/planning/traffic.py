"""What each engine computes and sends in one update, and in which order; tests hold it to what the engines really send.

An update is a list of tasks. Each runs on one resource (the device, or the links of a group of ranks), which takes its
tasks in the order of the list; a task begins when its resource is free and the tasks that it waits for have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from w2vscale.config import Config, EngineConfig
from w2vscale.engine.deepspeed.config import deepspeed_config
from w2vscale.planning.links import Kind
from w2vscale.planning.work import Model, Unit

FP32, BF16 = 4, 2  # bytes

MIB = 2**20
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
"""DDP reduces a bucket once its gradients have at least this size: the first one that is complete, and the others."""


class Task(NamedTuple):
    """Computing, if `kind` is None, or a collective over `size` bytes in the group `resource`."""

    resource: str
    after: tuple[int, ...]  # places of earlier tasks in the list
    seconds: float = 0.0
    kind: Kind | None = None
    size: float = 0.0


@dataclass
class Update:
    """Collects the tasks of an update."""

    tasks: list[Task] = field(default_factory=list)

    def compute(self, seconds: float, *after: int) -> int:
        """Add work of the device; its place in the list."""
        self.tasks.append(Task("device", after, seconds))
        return len(self.tasks) - 1

    def send(self, kind: Kind, size: float, group: str, *after: int) -> int:
        """Add a collective; its place in the list."""
        self.tasks.append(Task(group, after, kind=kind, size=size))
        return len(self.tasks) - 1

    def sends(self) -> list[int]:
        """Places of all collectives so far."""
        return [place for place, task in enumerate(self.tasks) if task.kind is not None]


class Pace(NamedTuple):
    """Seconds that the device computes: for one forward, for its backward, and for the optimizer step."""

    forward: float
    backward: float
    step: float


@dataclass(frozen=True)
class Backend:
    """How an engine's host code and the library of collectives behave.

    `waits`: the host waits for each collective of a sharded engine, as on a CPU. On a GPU the host is ahead of the
    device: parameters are gathered while the part before computes, and it goes on while gradients are reduced.
    (DDP never waits before its last bucket.)
    `scatters`: a reduce-scatter sends half of what an all-reduce sends. gloo's is an all-reduce, and
    each rank keeps its part.
    """

    waits: bool
    scatters: bool


NCCL = Backend(waits=False, scatters=True)
GLOO = Backend(waits=True, scatters=False)


@dataclass(frozen=True)
class Sharding:
    """An engine, its settings, and the number of ranks."""

    engine: str
    ranks: int
    shard_size: int  # ranks that share one copy, with fsdp; elsewhere all
    working_bytes: int  # of a parameter as it is gathered
    reduced_bytes: int  # of a gradient as it is summed over ranks
    reshards: bool  # engine.reshard_after_forward
    zero: Mapping[str, Any]  # section zero_optimization of the DeepSpeed configuration
    offloads: bool = False  # to host memory

    @property
    def gathers_in(self) -> str:
        """The group in which parameters are gathered."""
        return "all" if self.shard_size == self.ranks else "shard"


def _engine(name: str, **others: object) -> dict[str, object]:
    return {"name": name, "offload": False, "shard_size": None, "reshard_after_forward": True, **others}


ENGINES = {
    "ddp": _engine("ddp"),
    "fsdp": _engine("fsdp"),
    "fsdp_keep": _engine("fsdp", reshard_after_forward=False),
    "hsdp": _engine("fsdp", shard_size="node"),
    "zero1": _engine("deepspeed", deepspeed_config="zero1"),
    "zero2": _engine("deepspeed", deepspeed_config="zero2"),
    "zero3": _engine("deepspeed", deepspeed_config="zero3"),
}
"""Settings of each engine. fsdp_keep: parameters stay until the backward. hsdp: a copy of the model per node."""

OFFLOADED = {
    "fsdp_offload": _engine("fsdp", offload=True),
    "zero2_offload": _engine("deepspeed", deepspeed_config="zero2_offload"),
    "zero3_offload": _engine("deepspeed", deepspeed_config="zero3_offload"),
}
"""Settings of engines that keep their state, or most of it, in host memory."""


def engine_settings(engine: str, before: EngineConfig) -> EngineConfig:
    """Return the settings of an engine of the tables above for a run that has those `before`."""
    changes = (ENGINES | OFFLOADED)[engine]
    if engine.startswith("zero3") and before.compile is True:  # which ZeRO-3 refuses
        changes = {**changes, "compile": False}
    return before.model_copy(update=changes)


DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""Of DeepSpeed 0.19.8, for keys that a file leaves out."""


def sharding_of(engine: str, model: Model, ranks: int, *, per_node: int) -> Sharding:
    """Return what an engine of the tables means on this many ranks."""
    settings = engine_settings(engine, model.config.engine)
    return sharding_by(model.config.model_copy(update={"engine": settings}), ranks, per_node=per_node)


def sharding_by(config: Config, ranks: int, *, per_node: int = 8) -> Sharding:
    """Return what the settings of a run mean on this many ranks."""
    engine, precision = config.engine, config.precision
    kind, size, offloads = str(engine.name), ranks, engine.offload
    zero: Mapping[str, Any] = {}
    if engine.name == "fsdp":
        size = min(per_node, ranks) if engine.shard_size == "node" else engine.shard_size or ranks
        kind = "fsdp_keep" if not engine.reshard_after_forward else "fsdp" if size == ranks else "hsdp"
    elif engine.name == "deepspeed":
        zero = DEFAULTS | deepspeed_config(engine, config.optim, precision)["zero_optimization"]
        kind, offloads = f"zero{zero['stage']}", (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    return Sharding(
        kind,
        ranks,
        size,
        working_bytes=BF16 if precision.compute == "bf16" else FP32,
        reduced_bytes=BF16 if precision.reduce == "bf16" else FP32,
        reshards=engine.reshard_after_forward,
        zero=zero,
        offloads=offloads,
    )


def update_of(model: Model, sharding: Sharding, *, forwards: int, pace: Pace, backend: Backend) -> list[Task]:
    """The tasks of one update of `forwards` forwards on each rank."""
    update = Update()
    if sharding.ranks == 1:
        for _ in range(forwards):
            update.compute(pace.forward + pace.backward)
        update.compute(pace.step)
        return update.tasks
    build: dict[str, Callable[..., None]] = {"ddp": _ddp, "zero1": _zero1, "zero2": _zero2, "zero3": _zero3}
    build |= dict.fromkeys(("fsdp", "fsdp_keep", "hsdp"), _fsdp)
    build[sharding.engine](update, model, sharding, forwards, pace, backend)
    return update.tasks


def _ddp(update: Update, model: Model, sharding: Sharding, forwards: int, pace: Pace, backend: Backend) -> None:
    """All gradients are reduced once per update, a bucket when the last backward has computed all of it."""
    for _ in range(forwards - 1):
        update.compute(pace.forward + pace.backward)
    update.compute(pace.forward)
    computed = dict(_backward(update, model, pace))
    buckets = [
        update.send("all_reduce", sharding.reduced_bytes * elements, "all", computed[unit])
        for elements, unit in buckets_of(model, FIRST_BUCKET // FP32, BUCKET // FP32)
    ]
    update.compute(pace.step, *buckets)


def _zero1(update: Update, model: Model, sharding: Sharding, forwards: int, pace: Pace, backend: Backend) -> None:
    """Nothing is sent before the step: then gradients are reduced, and the stepped parts of parameters gathered."""
    for _ in range(forwards):
        last = update.compute(pace.forward + pace.backward)
    size = sharding.zero["reduce_bucket_size"]
    for elements, _ in buckets_of(model, size, size, over=False):
        update.send("all_reduce", sharding.reduced_bytes * elements, "all", last)
    _step_and_gather(update, model, sharding, pace)


def _zero2(update: Update, model: Model, sharding: Sharding, forwards: int, pace: Pace, backend: Backend) -> None:
    """Every backward reduces all gradients. DeepSpeed's reduction of a bucket is an all-reduce."""
    size = sharding.zero["reduce_bucket_size"]
    buckets = buckets_of(model, size, size, over=False)
    for _ in range(forwards):
        update.compute(pace.forward, *_waiting(update, backend))
        sent = 0
        for unit, place in _backward(update, model, pace, backend):
            while sent < len(buckets) and buckets[sent][1] == unit:
                update.send("all_reduce", sharding.reduced_bytes * buckets[sent][0], "all", place)
                sent += 1
    _step_and_gather(update, model, sharding, pace)


def _step_and_gather(update: Update, model: Model, sharding: Sharding, pace: Pace) -> None:
    """The norm over all ranks, the step of each rank's part of the parameters, and gathering all of them."""
    norm = update.send("all_reduce", FP32, "all", *update.sends())
    stepped = update.compute(pace.step / sharding.ranks, norm)
    update.send("all_gather", sharding.working_bytes * model.parameters, "all", stepped)


class Part(NamedTuple):
    """What is gathered and reduced together: its share of the computing, and bytes."""

    share: float
    gathered: float
    gathered_again: bool  # for the backward
    reduced: float


def _fsdp(update: Update, model: Model, sharding: Sharding, forwards: int, pace: Pace, backend: Backend) -> None:
    """Units are gathered before their forward and, if resharded, before their backward, and reduced after it."""

    def part(unit: Unit) -> Part:
        elements = unit.padded(sharding.shard_size)
        working = FP32 if unit.whole else sharding.working_bytes
        return Part(model.share(unit), working * elements, sharding.reshards, sharding.reduced_bytes * elements)

    *parts, rest = map(part, model.units)
    for number in range(1, forwards + 1):
        last = number == forwards
        _sharded_forward(update, parts, rest, sharding, pace, backend, reduces=sharding.reshards or last, last=last)
    norm = update.send("all_reduce", FP32, sharding.gathers_in, *update.sends())
    update.compute(pace.step / sharding.shard_size, norm)


def _zero3(update: Update, model: Model, sharding: Sharding, forwards: int, pace: Pace, backend: Backend) -> None:
    """As FSDP2, in larger parts. As many of them as `stage3_max_live_parameters` allows stay until the backward.

    Small parameters are never sharded: they are gathered one by one after the step.
    """
    threshold = sharding.zero["stage3_param_persistence_threshold"]
    size, live = sharding.zero["stage3_prefetch_bucket_size"], sharding.zero["stage3_max_live_parameters"]
    parts = list(_zero3_parts(model, sharding, size, live, threshold))
    nothing = Part(0.0, 0.0, False, 0.0)
    for _ in range(forwards):
        _sharded_forward(update, parts, nothing, sharding, pace, backend, reduces=True, last=False)
    norm = update.send("all_reduce", FP32, "all", *update.sends())
    stepped = update.compute(pace.step / sharding.ranks, norm)
    for unit in model.units:
        for shape in unit.shapes:
            if (elements := Unit((shape,), 0.0, False).padded_flat(sharding.ranks)) < threshold:
                update.send("all_gather", sharding.working_bytes * elements, "all", stepped)


def _zero3_parts(model: Model, sharding: Sharding, size: int, live: int, threshold: int) -> Iterator[Part]:
    """Units in groups of at least `size` elements. The first ones are gathered again: the last `live` elements stay."""
    left = model.parameters
    group: list[Unit] = []
    for unit in model.units:
        group.append(unit)
        elements = sum(one.elements for one in group)
        if elements >= size or unit is model.units[-1]:
            gathered = sum(one.padded_flat(sharding.ranks, above=threshold) for one in group)
            reduced = sum(one.padded_flat(sharding.ranks) for one in group)
            share = sum(map(model.share, group))
            yield Part(share, sharding.working_bytes * gathered, left > live, sharding.reduced_bytes * reduced)
            left -= elements
            group = []


def _sharded_forward(
    update: Update, parts: Sequence[Part], rest: Part, sharding: Sharding, pace: Pace, backend: Backend,
    *, reduces: bool, last: bool,
) -> None:  # fmt: skip
    """A forward and its backward. Gathering is one part ahead of computing; `rest` stays gathered throughout."""
    group, replicas = sharding.gathers_in, sharding.ranks // sharding.shard_size

    def reduce(part: Part, place: int) -> None:
        if reduces and part.reduced:
            reduced = update.send("reduce_scatter", part.reduced, group, place)
            if last and replicas > 1:
                update.send("all_reduce", part.reduced / sharding.shard_size, "replicate", reduced)

    computed = [*_waiting(update, backend)][-1:] or [update.compute(0.0)]
    if rest.gathered:
        computed.append(update.send("all_gather", rest.gathered, group, computed[-1]))
    ahead = 1 if backend.waits else 2
    for part in parts:
        gathered = update.send("all_gather", part.gathered, group, computed[max(len(computed) - ahead, 0)])
        computed.append(update.compute(pace.forward * part.share, gathered, computed[-1]))
    computed.append(update.compute((pace.forward + pace.backward) * rest.share))
    backwards = parts[::-1]

    def gather_again(number: int) -> list[int]:
        """The collective that a backward waits for, if it needs one."""
        if number == len(backwards) or not backwards[number].gathered_again:
            return []
        waiting = [computed[-1], *_waiting(update, backend)]
        return [update.send("all_gather", backwards[number].gathered, group, *waiting)]

    ready = gather_again(0)
    for number, part in enumerate(backwards):
        waiting = [*ready, *_waiting(update, backend)]
        ready = gather_again(number + 1)  # while this part computes, unless the host waits for it
        waiting += ready if backend.waits else []
        computed.append(update.compute(pace.backward * part.share, *waiting))
        reduce(part, computed[-1])
    reduce(rest, computed[-1])


def _backward(update: Update, model: Model, pace: Pace, backend: Backend = NCCL) -> Iterator[tuple[int, int]]:
    """Compute a backward unit by unit; yields each unit and the place of its task."""
    for unit in reversed(range(len(model.units))):
        seconds = pace.backward * model.share(model.units[unit])
        yield unit, update.compute(seconds, *_waiting(update, backend))


def _waiting(update: Update, backend: Backend) -> list[int]:
    """What the device has to wait for if its host waits for collectives: the last one that reduces."""
    if not backend.waits:
        return []
    reducing = [place for place in update.sends() if update.tasks[place].kind != "all_gather"]
    return reducing[-1:]


def buckets_of(model: Model, first: int, size: int, *, over: bool = True) -> list[tuple[int, int]]:
    """(elements, last unit) of the buckets that the backward fills one after the other.

    A bucket is complete when it has at least `size` elements (the first: `first`); unless `over`, before it has more.
    """
    buckets: list[tuple[int, int]] = []
    elements, unit = 0, len(model.units) - 1
    for more, owner in model.backward:
        if not over and elements and elements + more > size:
            buckets.append((elements, unit))
            elements = 0
        elements += more
        unit = min(unit, owner)
        if over and elements >= (size if buckets else first):
            buckets.append((elements, unit))
            elements = 0
    return [*buckets, (elements, unit)] if elements else buckets


def ends(tasks: Sequence[Task], seconds: Callable[[Task], float]) -> list[float]:
    """When each task ends, in seconds from the start of the update; `seconds` says how long a collective takes."""
    free: dict[str, float] = {}
    done: list[float] = []
    for task in tasks:
        begins = max([free.get(task.resource, 0.0), *(done[place] for place in task.after)])
        done.append(begins + (task.seconds if task.kind is None else seconds(task)))
        free[task.resource] = done[-1]
    return done
