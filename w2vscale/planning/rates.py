"""How fast a GPU computes: by the roofline model, or as tools/bench/gpu.py has measured one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.errors import UserError
from w2vscale.planning.links import Cluster
from w2vscale.planning.work import Model

ATTAINED = 0.65
"""Share of the rate of the roofline model that an H100 reached with `base` and `large`, compiled, in long forwards."""

STEP_BYTES = 96
"""Memory traffic of the optimizer step per parameter, at the bandwidth of the GPU: clipping and fused AdamW, as slow as
an H100 was (32 ps). Reading and writing each number once would be 28 bytes."""

HOST = (0.025, 0.0011)
"""Seconds in which a host launches a forward and its backward, at 0 layers and per layer: measured beside an H100."""

MEASURED_FLOPS = 8e14
"""What the measured GPU sustains in matrix products (docs/performance.md). The MFU of others is assumed to be equal."""


class Rates(NamedTuple):
    """How fast one GPU computes.

    `mfu`: of forward and backward in long forwards. `step`: seconds of the optimizer step per parameter. `host`:
    seconds in which the host launches a forward and its backward, as (at 0 layers, per layer).
    """

    mfu: float
    step: float
    host: tuple[float, float]


def roofline_rates(model: Model, cluster: Cluster, utterances: float) -> Rates:
    """Return the rates of forwards of this many utterances, with what is recomputed in them."""
    line = model.timeline
    seconds = (line.forward_seconds(utterances) + line.backward_seconds(utterances)) / ATTAINED
    mfu = model.flops * utterances * line.seconds / seconds / cluster.flops
    return Rates(mfu, STEP_BYTES / cluster.bandwidth, HOST)


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
