"""Seconds of an update on many GPUs, and what follows: efficiency, days, GPU-hours, and whether the state fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tools.scaling.links import Algorithm, Cluster, Group, collective_seconds, replica_group, shard_group, whole_group
from tools.scaling.traffic import FP32, NCCL, Backend, Pace, Sharding, Task, ends, sharding_of, update_of
from tools.scaling.work import Model
from w2vscale.errors import UserError

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "lab" / "2026-11-26-h100.json"
"""The only GPU that has been measured (tools/bench/gpu.py)."""

MEASURED_FLOPS = 8e14
"""What that GPU sustains in matrix products (docs/performance.md): the MFU of others is assumed to be the same."""

AGREEMENT_HOP = 50e-6
"""Seconds that a message of gloo takes from host to host. Hosts agree on each update by an all-reduce of 64 bytes."""


class Rates(NamedTuple):
    """How fast one GPU computes.

    `mfu`: of forward and backward in long forwards. `step`: seconds of the optimizer step per parameter. `host`:
    seconds in which the host launches a forward and its backward, as (at 0 layers, per layer).
    """

    mfu: float
    step: float
    host: tuple[float, float]


def measured_rates(file: Path) -> dict[str, Rates]:
    """Rates of `base` and `large` from a result of tools/bench/gpu.py.

    Raises:
        UserError: it is not such a result, or has no rates.
    """
    try:
        phases = json.loads(file.read_text())["phases"]
        tables = {name: phases[f"rates_{name}"] for name in ("base", "large")}
        launching = [_short_forward(rows) for rows in tables.values()]
        per_layer = (launching[1] - launching[0]) / 12  # 24 layers and 12
        host = (launching[0] - 12 * per_layer, per_layer)
        return {
            name: Rates(*_long_forwards(tables[name], parameters), host)
            for name, parameters in (("base", 95_044_608), ("large", 317_390_592))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a result of tools/bench/gpu.py with rates of base and large ({error!r})"
        ) from None


def _long_forwards(rows: Mapping[str, Any], parameters: int) -> tuple[float, float]:
    """MFU of a window and seconds of a step per parameter, in the faster row of the longest forward."""
    equal = [row for key, row in rows.items() if key.endswith("/equal") and row and "error" not in row]
    longest = max(row["forward_seconds"] for row in equal)  # an update has one such forward
    best = min((row for row in equal if row["forward_seconds"] == longest), key=lambda row: float(row["window_ms"]))
    flops = best["flops_per_second"] / best["audio_per_second"] * best["forward_seconds"]
    return flops / (best["window_ms"] / 1000) / MEASURED_FLOPS, best["step_ms"] / 1000 / parameters


def _short_forward(rows: Mapping[str, Any]) -> float:
    """Seconds of the host per forward, in the row with the shortest forwards, where the device waits for the host."""
    equal = [row for key, row in rows.items() if key.startswith("eager/") and key.endswith("/equal")]
    longest = max(row["forward_seconds"] for row in equal)
    short = min(equal, key=lambda row: float(row["forward_seconds"]))
    return float(short["host_ms"]) / 1000 * short["forward_seconds"] / longest


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
    fits: bool  # state of the model and of the optimizer, in 80 % of the memory

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


def predict(model: Model, engine: str, ranks: int, micro_batches: int, setting: Setting) -> Prediction:
    """One update of `micro_batches` per GPU."""
    sharding = sharding_of(engine, model, ranks, per_node=setting.cluster.gpus_per_node)
    state = state_bytes(sharding, model)
    forwards = -(-micro_batches // per_forward(model, micro_batches, setting.cluster.memory - state))
    audio = micro_batches * model.micro_batch_seconds
    device = audio * model.flops / (setting.rates.mfu * setting.cluster.flops) / forwards
    step = setting.rates.step * model.parameters
    pace = Pace(device / 3, device * 2 / 3, step)  # a backward has twice the products of its forward
    tasks = update_of(model, sharding, forwards=forwards, pace=pace, backend=setting.backend)
    seconds = ends(tasks, network(sharding, setting.cluster, setting.algorithm, setting.backend))
    fixed, per_layer = setting.rates.host
    host = forwards * (fixed + per_layer * model.config.model.layers) + 2 * (ranks - 1) * AGREEMENT_HOP
    return Prediction(
        model,
        sharding,
        micro_batches,
        seconds=max(*seconds, host),
        computing=sum(task.seconds for task in tasks),
        stepping=next(task.seconds for task in reversed(tasks) if task.kind is None),
        host=host,
        fits=state <= 0.8 * setting.cluster.memory,
    )


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


def per_forward(model: Model, micro_batches: int, memory: float) -> int:
    """Micro-batches that share a forward: as many as `batch.same_bucket` and memory for activations allow."""
    one = model.micro_batch_seconds * model.activation_bytes()
    most = min(micro_batches, model.config.batch.same_bucket, int(0.9 * memory / one))
    return max((count for count in range(1, most + 1) if micro_batches % count == 0), default=1)


def state_bytes(sharding: Sharding, model: Model) -> float:
    """Weights, masters, gradients and moments on each rank, and what is gathered for the moment (docs/engines.md)."""
    working, copies = sharding.working_bytes, sharding.shard_size
    largest = max(unit.elements for unit in model.units) / model.parameters
    shared = 16 / copies
    per_parameter = {
        "ddp": 16 + (working if working < FP32 else 0),
        "fsdp_keep": shared + working + FP32,
        "zero1": working + FP32 + (working if working < FP32 else 0) + 12 / copies,
        "zero2": working + 16 / copies,
        "zero3": (working + 16) / copies + working * min(1, 2e8 / model.parameters),
    }
    return model.parameters * per_parameter.get(sharding.engine, shared + 2 * largest * (working + FP32))


def dealt(model: Model, engine: str, gpus: Sequence[int], setting: Setting) -> list[Prediction]:
    """The preset's update dealt to more and more GPUs, as long as each has a micro-batch (strong scaling)."""
    total = model.config.batch.micro_batches
    return [predict(model, engine, ranks, total // ranks, setting) for ranks in gpus if total % ranks == 0]


def added(model: Model, engine: str, gpus: Sequence[int], micro_batches: int, setting: Setting) -> list[Prediction]:
    """Updates that grow with the GPUs: `micro_batches` on each (weak scaling)."""
    return [predict(model, engine, ranks, micro_batches, setting) for ranks in gpus]


def efficiency(prediction: Prediction, setting: Setting) -> float:
    """Audio per second and GPU, relative to one GPU that runs the preset's whole update in long forwards."""
    model = prediction.model
    alone = predict(model, "ddp", 1, model.config.batch.micro_batches, setting)
    return prediction.audio_per_second / prediction.ranks / alone.audio_per_second


def enough(model: Model, engine: str, ranks: int, setting: Setting) -> int | None:
    """The fewest micro-batches per GPU (a power of two up to 512) that give an efficiency of 90 %: more help little."""
    for micro_batches in (2**power for power in range(10)):
        if efficiency(predict(model, engine, ranks, micro_batches, setting), setting) >= 0.9:
            return micro_batches
    return None
