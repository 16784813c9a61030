"""What an engine costs over a bare PyTorch loop of the same arithmetic, in one process.

    python tools/bench/engine_overhead.py

`tiny` trains on the same prepared micro-batches in the loop below, which knows no engine, and in an engine, from the
same initial values to the same losses. Both take turns, update by update; the ratio is the median over the pairs of
updates. On a CPU it is taken of the processor time of this process, which has one thread, so that others on the machine
count less; on a GPU of the time on the clock. A second bare loop in an engine's place shows how far noise goes.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from tests.helpers.batches import inputs_of
from tools.bench.engine_parity import ENGINES
from tools.bench.running import build, filled_model
from tools.bench.script import console, run_script
from w2vscale.config import Config, load_config
from w2vscale.config.tree import OptimConfig
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.contrastive import Contrastive

LR = 1e-4
WARM_UP = 3
"""Updates that are not counted."""

Update = Callable[[MicroBatch], tuple[float, float]]
"""Trains on one micro-batch; returns its loss per masked frame and the gradient's norm."""


@dataclass(frozen=True)
class Race:
    """An engine against the bare loop: seconds of each pair of updates."""

    bare_cpu: list[float]
    bare_clock: list[float]
    cpu_ratios: list[float]
    clock_ratios: list[float]
    max_relative_loss_difference: float


def main(
    updates: Annotated[int, typer.Option(min=10, help="Pairs of updates per engine.")] = 100,
    seconds: Annotated[
        float, typer.Option(help="Audio of one micro-batch; a tenth of the preset's, so that overhead shows.")
    ] = 4.0,
    engines: Annotated[str, typer.Option(help="Which, with commas; the first gives the ratio.")] = ",".join(ENGINES),
) -> None:
    """Time engines against a bare loop."""
    torch.set_num_threads(1)
    names = engines.split(",")
    races: dict[str, Race] = {}
    with process_group(needed=True) as (_, device):
        config = load_config("tiny", [f"batch.max_seconds={seconds}"])
        batches = [micro_batch(config, number, seconds) for number in range(WARM_UP + updates)]
        races["bare loop"] = race(bare_loop(config, device), bare_loop(config, device), batches)
        for name in names:
            engine = engine_loop(load_config("tiny", [ENGINES[name]]), device)
            races[name] = race(bare_loop(config, device), engine, batches)
    print_table(races, title=f"tiny, {updates} pairs of updates of {seconds:g} s, one thread, {device.type}")
    first = races[names[0]]
    ratios = first.cpu_ratios if device.type == "cpu" else first.clock_ratios
    print(
        json.dumps(
            {
                "ratio": statistics.median(ratios),
                "ratio_clock": statistics.median(first.clock_ratios),
                "max_relative_loss_difference": max(one.max_relative_loss_difference for one in races.values()),
                "updates": updates,
                "bare_cpu_seconds": statistics.median(first.bare_cpu),
                "engines": {
                    name: {
                        "ratio": statistics.median(one.cpu_ratios),
                        "quartiles": statistics.quantiles(one.cpu_ratios, n=4),
                        "ratio_clock": statistics.median(one.clock_ratios),
                        "quartiles_clock": statistics.quantiles(one.clock_ratios, n=4),
                    }
                    for name, one in races.items()
                },
            }
        )
    )


def bare_loop(config: Config, device: torch.device) -> Update:
    """The arithmetic of one update, written down."""
    objective, model = build_objective(config), filled_model(config).to(device)
    assert isinstance(objective, Contrastive)
    parameters = list(model.parameters())
    optimizer = bare_adamw(model, config.optim)
    model.train()

    def update(batch: MicroBatch) -> tuple[float, float]:
        inputs: Any = to_device(batch.inputs, device)
        step = StepContext(config.trainer.seed, batch.number, (batch.number,))
        sums = model(
            inputs,
            noise_MGV=objective._gumbel_noise(inputs, step),
            temperature=objective.settings.temperature(batch.number),
        )
        (sums.total * (1.0 / batch.weight)).backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optim.max_norm or math.inf, foreach=True))
        optimizer.step()
        optimizer.zero_grad()
        return float(sums.total.detach()) / batch.weight, norm

    return update


def bare_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the preset's settings: vectors do not decay, feature encoder and quantizer learn at a tenth."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        slow = "feature_encoder" in name or "quantizer.projection" in name
        matrix = sum(size > 1 for size in parameter.shape) > 1
        groups.setdefault((slow, matrix), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": LR * (0.1 if slow else 1.0),
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (slow, matrix), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def engine_loop(config: Config, device: torch.device) -> Update:
    """The same update as the training loop has an engine do it."""
    setup = build(config, device)

    def update(batch: MicroBatch) -> tuple[float, float]:
        sums = setup.window([batch], float(batch.weight), update=batch.number)
        norm = setup.step(LR, config.optim.max_norm)
        return float(sums.total) / batch.weight, float(norm)

    return update


def micro_batch(config: Config, number: int, seconds: float) -> MicroBatch:
    """Utterances of noise between half of `data.max_seconds` and all of it, `seconds` when padded."""
    draws = np.random.default_rng(number)
    longest = int(config.data.max_seconds * config.model.sampling_rate)
    lengths = [longest, *draws.integers(longest // 2, longest, size=max(int(seconds / config.data.max_seconds) - 1, 0))]
    waveforms = [draws.standard_normal(length, dtype=np.float32) for length in lengths]
    inputs = inputs_of(build_objective(config), waveforms, number=number)
    return MicroBatch(number, inputs, sum(map(len, waveforms)))


def race(bare: Update, engine: Update, batches: Sequence[MicroBatch]) -> Race:
    """Both train on each micro-batch in turn; who goes first alternates. The first few updates are not counted."""
    cpu: dict[Update, list[float]] = {bare: [], engine: []}
    clock: dict[Update, list[float]] = {bare: [], engine: []}
    losses: dict[Update, list[float]] = {bare: [], engine: []}
    for index, batch in enumerate(batches):
        for update in (bare, engine) if index % 2 else (engine, bare):
            began, began_cpu = time.perf_counter(), time.process_time()
            loss, _ = update(batch)
            cpu[update].append(time.process_time() - began_cpu)
            clock[update].append(time.perf_counter() - began)
            losses[update].append(loss)
    return Race(
        bare_cpu=cpu[bare][WARM_UP:],
        bare_clock=clock[bare][WARM_UP:],
        cpu_ratios=[ours / theirs for ours, theirs in zip(cpu[engine], cpu[bare], strict=True)][WARM_UP:],
        clock_ratios=[ours / theirs for ours, theirs in zip(clock[engine], clock[bare], strict=True)][WARM_UP:],
        max_relative_loss_difference=max(
            abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses[engine], losses[bare], strict=True)
        ),
    )


def print_table(races: dict[str, Race], *, title: str) -> None:
    """Ratios with their quartiles, and what the bare loop took."""
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("engine")
    for heading in (
        "bare loop, CPU ms",
        "ratio",
        "quartiles",
        "ratio by the clock",
        "quartiles",
        "loss: max rel. diff.",
    ):
        table.add_column(heading, justify="right")
    for name, one in races.items():
        lower, median, upper = statistics.quantiles(one.cpu_ratios, n=4)
        lower_clock, median_clock, upper_clock = statistics.quantiles(one.clock_ratios, n=4)
        table.add_row(
            name,
            f"{1000 * statistics.median(one.bare_cpu):.1f}",
            f"{median:.3f}",
            f"{lower:.3f} – {upper:.3f}",
            f"{median_clock:.3f}",
            f"{lower_clock:.3f} – {upper_clock:.3f}",
            f"{one.max_relative_loss_difference:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    run_script(main)
