"""Which engine, recomputation and offload suit a run on some GPUs: all of them side by side, and a recommendation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from w2vscale.config import BatchConfig, Config, in_yaml
from w2vscale.config.running import EngineConfig
from w2vscale.errors import UserError, counted
from w2vscale.objectives import Objective
from w2vscale.planning.exposure import Corpus, Exposure, exposure
from w2vscale.planning.fitting import per_forward, usable
from w2vscale.planning.footprint import Footprint
from w2vscale.planning.links import Cluster
from w2vscale.planning.memory import demand
from w2vscale.planning.prediction import Prediction, Setting, predict
from w2vscale.planning.rates import SHARDING_HOST, Rates, roofline_rates
from w2vscale.planning.traffic import OFFLOADED, Sharding, engine_settings, sharding_of
from w2vscale.planning.work import FILLED, Model, model_of

RECOMPUTATIONS: tuple[str, ...] = get_args(EngineConfig.model_fields["activation_checkpointing"].annotation)

SIMPLEST = ("ddp", "fsdp", "hsdp", "fsdp_keep", "zero1", "zero2", "zero3", *OFFLOADED)
AS_FAST = 1.03
"""Of settings that take at most this many times as long as the fastest, the simplest is recommended."""

MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class Row:
    """One engine with one recomputation. The batch is that of the settings, or one that fits with as much audio."""

    engine: str
    recomputation: str
    footprint: Footprint  # with a forward of the settings; with batch.concat=auto, of one micro-batch
    longest: float  # seconds of the longest micro-batch that fits; 0 if no utterance does
    lacks: float  # bytes of a GPU that are missing for the shortest micro-batch; 0 if it fits
    lacks_host: float  # bytes of host memory that are missing on each node
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
    enough: int | None = None  # if nothing fits, a number of GPUs on which something does; None: none was found

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
        """Return the settings of a row that fits, where they are not those of the run."""
        assert row.prediction is not None
        before, after = self.model.config, row.prediction.model.config
        return [
            f"{section}.{key}={in_yaml(value)}"
            for section in ("engine", "batch")
            for key, value in getattr(after, section)
            if value != getattr(getattr(before, section), key)
        ]


def make_plan(
    name: str, config: Config, objective: Objective, *, gpus: int, nodes: int, cluster: Cluster,
    measured: Mapping[str, Rates] | None = None, corpus: Corpus | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:  # fmt: skip
    """Plan a run that `name` stands for on `gpus` GPUs in `nodes` nodes, with the speeds and memory of `cluster`.

    `measured`: rates of a GPU by preset (`measured_rates`), to use instead of the roofline model.
    Raises UserError if the nodes have different numbers of GPUs, or the model cannot be run with fake tensors.
    """
    if gpus % nodes:
        raise UserError(f"--gpus {gpus}: cannot be spread evenly over {counted(nodes, 'node')}; set --nodes")
    cluster = replace(cluster, gpus_per_node=gpus // nodes)
    batch = config.batch.model_copy(update={"micro_batches": dealt(config.batch.micro_batches, gpus)})
    filled = FILLED if corpus is None else corpus.filled(batch)
    model = replace(model_of(name, config, speeds=cluster.speeds), filled=filled).with_settings(batch=batch)
    every = {choice: recomputing(model, choice) for choice in RECOMPUTATIONS}
    names = [name for name in SIMPLEST if not (objective.changes_model and name.startswith("zero"))]
    if nodes == 1:
        names = [name for name in names if name not in ("hsdp", "fsdp_keep")]
    place = _Place(gpus, cluster, usable(cluster.memory), measured)
    rows: list[Row] = []
    for one in every.values():
        for engine in names:
            rows.append(_row(engine, one, every["none"], place))
            progress(len(rows), len(every) * len(names))
    rows.sort(key=lambda row: (not row.fits, _seconds(row), row.lacks, row.lacks_host))
    enough = None if rows[0].fits else _enough(every["full"], place)
    seen = exposure(model.config, corpus)
    return Plan(
        replace(model, config=config), cluster, gpus, place.limit, batch.micro_batches, seen, tuple(rows), enough
    )


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


@dataclass(frozen=True)
class _Place:
    """Where a run is planned."""

    gpus: int
    cluster: Cluster
    limit: float  # bytes that may be allocated on a GPU
    measured: Mapping[str, Rates] | None


def _row(engine: str, model: Model, plain: Model, place: _Place) -> Row:
    """Plan an engine with the recomputation of `model`; `plain`: the same without recomputation."""
    gpus, cluster, limit = place.gpus, place.cluster, place.limit
    batch, utterance = model.config.batch, model.config.data.max_seconds
    recomputation = model.config.engine.activation_checkpointing
    sharding = sharding_of(engine, model, gpus, per_node=cluster.gpus_per_node)
    per_rank = batch.micro_batches // gpus
    together = min(_least(batch), per_rank)
    needed = demand(model, sharding, forwards=math.ceil(per_rank / together))
    footprint = needed.footprint(together * model.utterances)
    if needed.longest(limit) < together * model.utterances:
        # Shorter micro-batches are more, which take several forwards, whose gradients accumulate.
        together = _least(batch)
        needed = demand(model, sharding, forwards=2)
    longest = max(needed.longest(limit), 0.0) * utterance / together
    lacks_host = max(needed.host * cluster.gpus_per_node - cluster.host_memory, 0.0)
    if longest < utterance or lacks_host:
        lacks = max(needed.footprint(together).total - limit, 0.0)
        return Row(engine, recomputation, footprint, 0.0, lacks, lacks_host, None)
    model = model.with_settings(
        engine=engine_settings(engine, model.config.engine), batch=shortened(model.config, longest, gpus=gpus)
    )
    per_rank = model.config.batch.micro_batches // gpus
    together = per_forward(model, sharding, per_rank, limit)
    rates = _rates(model, plain, sharding, place, utterances=max(together, 1) * model.utterances)
    setting = Setting(cluster, "fastest", rates)
    prediction = predict(model, sharding, per_rank, per_forward=together, setting=setting)
    return Row(engine, recomputation, footprint, longest, 0.0, 0.0, prediction)


def _rates(model: Model, plain: Model, sharding: Sharding, place: _Place, *, utterances: float) -> Rates:
    """Return the rates of forwards of a number of utterances. What was measured is without recomputation, compiled."""
    compiled = model.config.engine.compile is not False and sharding.engine != "zero3"
    rates = roofline_rates(model, place.cluster, utterances, compiled=compiled)
    if place.measured is not None:
        nearest = place.measured["base" if model.config.model.dim < 1024 else "large"]
        slower = rates.flops / roofline_rates(plain, place.cluster, utterances).flops
        rates = nearest._replace(flops=nearest.flops * slower)
    fixed, per_layer = rates.host
    return rates._replace(host=(fixed + SHARDING_HOST[sharding.engine], per_layer))


def _least(batch: BatchConfig) -> int:
    """Return how many micro-batches share a forward at least, if a rank has as many."""
    return 1 if batch.concat == "auto" else batch.concat


def shortened(config: Config, longest: float, *, gpus: int) -> BatchConfig:
    """Return a batch whose micro-batches have at most `longest` seconds, with as much audio in an update.

    They are an equal part of those of the settings, or as short as utterances allow.
    """
    batch = config.batch
    if longest >= batch.max_seconds:
        return batch
    part = batch.max_seconds / math.ceil(batch.max_seconds / longest)
    seconds = max(math.floor(100 * part) / 100, config.data.max_seconds)
    count = dealt(round(batch.micro_batches * batch.max_seconds / seconds), gpus)
    return batch.model_copy(update={"max_seconds": seconds, "micro_batches": count})


def _enough(model: Model, place: _Place) -> int | None:
    """Return a number of GPUs, doubled and doubled again, on which FSDP2 or ZeRO-3 fits with all recomputation."""
    for gpus in (place.gpus * 2**power for power in range(1, MOST_DOUBLINGS + 1)):
        for engine in ("fsdp", "zero3"):
            sharding = sharding_of(engine, model, gpus, per_node=place.cluster.gpus_per_node)
            if demand(model, sharding, forwards=2).longest(place.limit) >= _least(model.config.batch):
                return gpus
    return None
