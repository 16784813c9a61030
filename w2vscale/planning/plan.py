"""Which engine, recomputation and offload suit a run on some GPUs: all of them side by side, and a recommendation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import get_args

from w2vscale.config import BatchConfig, Config
from w2vscale.config.tree import EngineConfig
from w2vscale.errors import UserError, counted
from w2vscale.objectives import Objective
from w2vscale.planning.exposure import Corpus, Exposure, exposure
from w2vscale.planning.fitting import per_forward, usable
from w2vscale.planning.footprint import Footprint
from w2vscale.planning.links import Cluster
from w2vscale.planning.memory import demand
from w2vscale.planning.prediction import Prediction, Setting, predict
from w2vscale.planning.rates import Rates, roofline_rates
from w2vscale.planning.traffic import ENGINES, OFFLOADED, sharding_of
from w2vscale.planning.work import Model, model_of

RECOMPUTATIONS: tuple[str, ...] = get_args(EngineConfig.model_fields["activation_checkpointing"].annotation)

SIMPLEST = ("ddp", "fsdp", "hsdp", "fsdp_keep", "zero1", "zero2", "zero3", *OFFLOADED)
AS_FAST = 1.03
"""Of settings that take at most this many times as long as the fastest, the simplest is recommended."""

MOST_GPUS = 1024


@dataclass(frozen=True)
class Row:
    """One engine with one recomputation. The batch is that of the settings, or one that fits with as much audio."""

    engine: str
    recomputation: str
    footprint: Footprint  # with one micro-batch of the settings in a forward
    longest: float  # seconds of the longest micro-batch that fits; 0 if no utterance does
    lacks: float  # bytes that are missing for the shortest micro-batch; 0 if it fits
    prediction: Prediction | None  # None if nothing fits

    @property
    def fits(self) -> bool:
        """Whether training is possible, with shorter micro-batches if need be."""
        return self.prediction is not None


@dataclass(frozen=True)
class Plan:
    """What a run needs and costs on `gpus` GPUs."""

    model: Model
    cluster: Cluster
    gpus: int
    limit: float  # bytes that may be allocated on a GPU
    micro_batches: int  # per update: the nearest number that can be dealt to the GPUs
    exposure: Exposure
    rows: tuple[Row, ...]  # those that fit first, the fastest of them first; then those that lack least
    enough: int | None = None  # if nothing fits, a number of GPUs on which something does; None: none up to MOST_GPUS

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.gpus // self.cluster.gpus_per_node

    @cached_property
    def recommended(self) -> Row | None:
        """The simplest of the fastest rows, if any fits."""
        if not self.rows[0].fits:
            return None
        fast = [row for row in self.rows if row.fits and _seconds(row) <= AS_FAST * _seconds(self.rows[0])]
        return min(fast, key=lambda row: (RECOMPUTATIONS.index(row.recomputation), SIMPLEST.index(row.engine)))

    def overrides(self, row: Row) -> list[str]:
        """Return the settings to type for a row that fits, beside those that the run has."""
        assert row.prediction is not None
        wanted = [*(ENGINES | OFFLOADED)[row.engine], f"engine.activation_checkpointing={row.recomputation}"]
        batch, before = row.prediction.model.config.batch, self.model.config.batch
        if batch.max_seconds != before.max_seconds:
            wanted.append(f"batch.max_seconds={batch.max_seconds:g}")
        if row.prediction.micro_batches * self.gpus != before.micro_batches:
            wanted.append(f"batch.micro_batches={row.prediction.micro_batches * self.gpus}")
        return wanted


def make_plan(
    name: str, config: Config, objective: Objective, *, gpus: int, nodes: int, cluster: Cluster,
    measured: Mapping[str, Rates] | None = None, corpus: Corpus | None = None,
) -> Plan:  # fmt: skip
    """Plan a run that `name` stands for on `gpus` GPUs in `nodes` nodes, with the speeds and memory of `cluster`.

    `measured`: rates of a GPU by preset (`measured_rates`), to use instead of the roofline model.
    Raises UserError if the nodes have different numbers of GPUs, or the model cannot be run with fake tensors.
    """
    if gpus % nodes:
        raise UserError(f"--gpus {gpus}: cannot be spread evenly over {counted(nodes, 'node')}; set --nodes")
    cluster = replace(cluster, gpus_per_node=gpus // nodes)
    batch = config.batch.model_copy(update={"micro_batches": dealt(config.batch.micro_batches, gpus)})
    model = model_of(name, config, speeds=cluster.speeds).with_batch(batch)
    every = {choice: recomputing(model, choice) for choice in RECOMPUTATIONS}
    names = [name for name in SIMPLEST if not (objective.changes_model and name.startswith("zero"))]
    if nodes == 1:
        names = [name for name in names if name not in ("hsdp", "fsdp_keep")]
    limit = usable(cluster.memory)
    rows = [
        _row(
            engine, choice, one, gpus=gpus, cluster=cluster, limit=limit, rates=_rates(every, choice, cluster, measured)
        )
        for choice, one in every.items()
        for engine in names
    ]
    rows.sort(key=lambda row: (not row.fits, _seconds(row), row.lacks))
    enough = None if rows[0].fits else _enough(every["full"], gpus=gpus, cluster=cluster, limit=limit)
    seen = exposure(model.config, corpus)
    ours = replace(model, config=config)
    return Plan(ours, cluster, gpus, limit, batch.micro_batches, seen, tuple(rows), enough)


def dealt(micro_batches: int, gpus: int) -> int:
    """Return the number of micro-batches nearest to this one that can be dealt to the GPUs."""
    return max(round(micro_batches / gpus), 1) * gpus


def recomputing(model: Model, choice: str) -> Model:
    """Return the model with another `engine.activation_checkpointing`."""
    engine = model.config.engine.model_copy(update={"activation_checkpointing": choice})
    return replace(model, config=model.config.model_copy(update={"engine": engine}))


def _seconds(row: Row) -> float:
    """Seconds of an update."""
    return math.inf if row.prediction is None else row.prediction.seconds


def _rates(
    every: Mapping[str, Model], choice: str, cluster: Cluster, measured: Mapping[str, Rates] | None
) -> Callable[[float], Rates]:
    """Return the rates of forwards of a number of utterances. What is measured is without recomputation."""
    by_roofline, without = (partial(roofline_rates, every[each], cluster) for each in (choice, "none"))
    if measured is None:
        return by_roofline
    nearest = measured["base" if every[choice].config.model.dim < 1024 else "large"]

    def scaled(utterances: float) -> Rates:
        return nearest._replace(mfu=nearest.mfu * by_roofline(utterances).mfu / without(utterances).mfu)

    return scaled


def _row(
    engine: str, choice: str, model: Model, *, gpus: int, cluster: Cluster, limit: float,
    rates: Callable[[float], Rates],
) -> Row:  # fmt: skip
    sharding = sharding_of(engine, model, gpus, per_node=cluster.gpus_per_node)
    per_rank = model.config.batch.micro_batches // gpus
    needed = demand(model, sharding, forwards=per_rank)
    if needed.longest(limit) < model.utterances:  # shorter ones are more than one, and their gradients accumulate
        needed = demand(model, sharding, forwards=2)
    longest = max(needed.longest(limit), 0.0) * model.config.data.max_seconds
    alone = needed.footprint(model.utterances)
    if longest < model.config.data.max_seconds:
        return Row(engine, choice, alone, 0.0, needed.footprint(1.0).total - limit, None)
    model = model.with_batch(shortened(model.config, longest, gpus=gpus))
    per_rank = model.config.batch.micro_batches // gpus
    together = per_forward(model, sharding, per_rank, limit)
    setting = Setting(cluster, "fastest", rates(max(together, 1) * model.utterances))
    prediction = predict(model, sharding, per_rank, per_forward=together, setting=setting)
    return Row(engine, choice, alone, longest, 0.0, prediction)


def shortened(config: Config, longest: float, *, gpus: int) -> BatchConfig:
    """Return a batch whose micro-batches have at most `longest` seconds, with as much audio in an update.

    They are an equal part of those of the settings, or as short as utterances allow.
    """
    batch = config.batch
    seconds = max(batch.max_seconds / math.ceil(batch.max_seconds / longest), config.data.max_seconds)
    if seconds >= batch.max_seconds:
        return batch
    count = dealt(round(batch.micro_batches * batch.max_seconds / seconds), gpus)
    return batch.model_copy(update={"max_seconds": seconds, "micro_batches": count})


def _enough(model: Model, *, gpus: int, cluster: Cluster, limit: float) -> int | None:
    """Return a number of GPUs, doubled and doubled again, on which FSDP2 or ZeRO-3 fits with all recomputation."""
    while (gpus := 2 * gpus) <= MOST_GPUS:
        for engine in ("fsdp", "zero3"):
            sharding = sharding_of(engine, model, gpus, per_node=cluster.gpus_per_node)
            if demand(model, sharding, forwards=2).longest(limit) >= 1.0:
                return gpus
    return None
