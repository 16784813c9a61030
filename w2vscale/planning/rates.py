"""How fast a GPU computes: by the roofline model, or as tools/bench/gpu.py has measured one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.errors import UserError
from w2vscale.planning.links import Cluster
from w2vscale.planning.work import Model

ATTAINED, ATTAINED_EAGER = 0.65, 0.60
"""Shares of the rate of the roofline model that an H100 reached with `base` and `large` in long forwards, compiled and
not: without compilation their rates were 8 and 9 % lower (docs/performance.md, Rates)."""

STEP_BYTES = 96
"""Memory traffic of the optimizer step per parameter, at the bandwidth of the GPU: clipping and fused AdamW, as slow as
an H100 was (32 ps). Reading and writing each number once would be 28 bytes."""

HOST = (0.025, 0.0011)
"""Seconds in which a host launches a forward and its backward, at 0 layers and per layer: measured beside an H100."""

SHARDING_HOST = {
    "ddp": 0.0, "fsdp": 0.035, "fsdp_keep": 0.035, "hsdp": 0.035, "zero1": 0.035, "zero2": 0.035, "zero3": 0.1
}  # fmt: skip
"""Seconds that the host code of each engine takes in addition: measured on a CPU with `tiny` and one forward per update
(docs/performance.md, Engines: the cost), and assumed for each forward."""


class Rates(NamedTuple):
    """How fast one GPU computes.

    `flops`: floating-point operations of the model (`Model.flops`) per second of forward and backward, in long
    forwards. `step`: seconds of the optimizer step per parameter. `host`: seconds in which the host launches a forward
    and its backward, as (at 0 layers, per layer).
    """

    flops: float
    step: float
    host: tuple[float, float]


def roofline_rates(model: Model, cluster: Cluster, utterances: float, *, compiled: bool = True) -> Rates:
    """Return the rates of forwards of this many utterances, with what is recomputed in them."""
    line = model.timeline
    seconds = line.forward_seconds(utterances) + line.backward_seconds(utterances)
    attained = ATTAINED if compiled else ATTAINED_EAGER
    flops = attained * model.flops * utterances * line.seconds / seconds
    return Rates(flops, STEP_BYTES / cluster.bandwidth, HOST)


def measured_rates(file: Path) -> dict[str, Rates]:
    """Rates of `base` and `large` from a result of tools/bench/gpu.py.

    Raises:
        UserError: it is not such a result, or has no rates.
    """
    try:
        phases = json.loads(file.read_text())["phases"]
        tables = {name: _Table(phases[f"rates_{name}"]) for name in ("base", "large")}
        launching = [table.launching() for table in tables.values()]
        per_layer = (launching[1] - launching[0]) / 12  # 24 layers and 12
        host = (launching[0] - 12 * per_layer, per_layer)
        return {
            name: Rates(*tables[name].long_forwards(parameters), host)
            for name, parameters in (("base", 95_044_608), ("large", 317_390_592))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: not a result of tools/bench/gpu.py with rates of base and large ({error!r})"
        ) from None


class _Table:
    """Rows of utterances of equal length. All updates have the same audio, in as many forwards as it takes."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        equal = {key: row for key, row in rows.items() if key.endswith("/equal")}
        self.rows = {key: row for key, row in equal.items() if row and "error" not in row}
        # That of the longest forward, which may not have fitted: its row is an error then.
        forms = [re.fullmatch(r"\w+/(\d+)x([\d.]+)s/equal", key) for key in equal]
        self.update_seconds = max(int(form[1]) * float(form[2]) for form in forms if form)

    def long_forwards(self, parameters: int) -> tuple[float, float]:
        """Operations per second of a window, and seconds of a step per parameter, in the fastest longest forward."""
        longest = max(row["forward_seconds"] for row in self.rows.values())
        same = [row for row in self.rows.values() if row["forward_seconds"] == longest]
        best = min(same, key=lambda row: float(row["window_ms"]))
        flops = best["flops_per_second"] / best["audio_per_second"] * self.update_seconds
        return flops / (best["window_ms"] / 1000), best["step_ms"] / 1000 / parameters

    def launching(self) -> float:
        """Seconds of the host per forward, in the row with the shortest, where the device waits for the host."""
        eager = [row for key, row in self.rows.items() if key.startswith("eager/")]
        short = min(eager, key=lambda row: float(row["forward_seconds"]))
        return float(short["host_ms"]) / 1000 * short["forward_seconds"] / self.update_seconds
