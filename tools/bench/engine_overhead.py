"""What an engine costs over a bare PyTorch loop of the same arithmetic, in one process.

    python tools/bench/engine_overhead.py

`tiny` trains on the same prepared micro-batches in the loop below, which knows no engine, and in each engine. They take
turns, update by update, from the same initial values; an update's ratio is its engine's time over the bare loop's time
for that update. They must have the same losses.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from w2vscale.config import Config, load_config
from w2vscale.config.tree import OptimConfig
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise, make_inputs
from w2vscale.distributed.process_group import process_group
from w2vscale.engine import build_engine
from w2vscale.engine.criterion import PretrainingCriterion
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining
from w2vscale.optim.schedules import gumbel_temperature
from w2vscale.training.run import empty_model, initial_values

ENGINES = {
    "ddp": "engine.name=ddp",
    "fsdp": "engine.name=fsdp",
    "zero1": "engine={name: deepspeed, deepspeed_config: zero1}",
    "zero2": "engine={name: deepspeed, deepspeed_config: zero2}",
    "zero3": "engine={name: deepspeed, deepspeed_config: zero3}",
}
LR = 1e-4
WARM_UP = 3
"""Updates that are not counted."""

Update = Callable[[MicroBatch], tuple[float, float]]
"""Trains on one micro-batch; returns its loss per masked frame and the gradient's norm."""

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)


def main(
    updates: Annotated[int, typer.Option(min=10, help="Of each contestant.")] = 60,
    seconds: Annotated[float, typer.Option(help="Audio of one micro-batch.")] = 12.0,
    engines: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(ENGINES),
) -> None:
    """Time engines against a bare loop."""
    torch.set_num_threads(1)
    names = engines.split(",")
    with process_group(needed=True) as (_, device):
        config = load_config("tiny", [f"batch.max_seconds={seconds}"])
        contestants = {"bare": bare_loop(config)}
        for name in names:
            contestants[name] = engine_loop(load_config("tiny", [ENGINES[name]]), device)
        batches = [micro_batch(config, number, seconds) for number in range(WARM_UP + updates)]
        times, differences = race(contestants, batches)
    ratios = {name: [ours / bare for ours, bare in zip(times[name], times["bare"], strict=True)] for name in names}
    print_table(times, ratios, differences, title=f"tiny, {updates} updates of {seconds:g} s, one thread")
    print(
        json.dumps(
            {
                "ratio": statistics.median(ratios[names[0]]),
                "ratios": {name: statistics.quantiles(values, n=4) for name, values in ratios.items()},
                "max_relative_loss_difference": differences,
                "bare_seconds": statistics.median(times["bare"]),
                "updates": updates,
            }
        )
    )


def bare_loop(config: Config) -> Update:
    """The arithmetic of one update, written down."""
    model = empty_model(config).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, (_, value) in zip(model.parameters(), initial_values(config), strict=True):
            parameter.copy_(value)
    parameters = list(model.parameters())
    optimizer = bare_adamw(model, config.optim)
    model.train()

    def update(batch: MicroBatch) -> tuple[float, float]:
        sums = model(
            batch.inputs,
            noise_MGV=gumbel_noise([batch], seed=config.trainer.seed, config=config.model, device=torch.device("cpu")),
            temperature=gumbel_temperature(batch.update, config.model),
        )
        (sums.total * (1.0 / batch.masked)).backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optim.max_norm or math.inf, foreach=True))
        optimizer.step()
        optimizer.zero_grad()
        return float(sums.total.detach()) / batch.masked, norm

    return update


def bare_adamw(model: Wav2Vec2ForPretraining, config: OptimConfig) -> torch.optim.AdamW:
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
    criterion = PretrainingCriterion(config.model, seed=config.trainer.seed)
    engine = build_engine(empty_model(config), criterion, config, device)
    engine.import_parameters(initial_values(config))

    def update(batch: MicroBatch) -> tuple[float, float]:
        sums = engine.run_window([batch], torch.tensor(float(batch.masked)))
        step = engine.step(lr=LR, max_norm=config.optim.max_norm)
        return float(sums.total) / batch.masked, step.grad_norm

    return update


def micro_batch(config: Config, number: int, seconds: float) -> MicroBatch:
    """Utterances of noise between half of `data.max_seconds` and all of it, `seconds` when padded."""
    draws = np.random.default_rng(number)
    longest = int(config.data.max_seconds * config.model.sampling_rate)
    lengths = [longest, *draws.integers(longest // 2, longest, size=max(int(seconds / config.data.max_seconds) - 1, 0))]
    waveforms = [draws.standard_normal(length, dtype=np.float32) for length in lengths]
    inputs = make_inputs(waveforms, range(len(lengths)), number=number, seed=0, config=config.model)
    return MicroBatch(update=number, number=number, inputs=inputs, audio_samples=sum(map(len, waveforms)))


def race(
    contestants: dict[str, Update], batches: Sequence[MicroBatch]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each contestant's updates after the warm-up, and its largest relative difference of the loss.

    Who goes when is drawn anew for each update.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for index, batch in enumerate(batches):
        for name in order.sample(list(contestants), len(contestants)):
            began = time.perf_counter()
            loss, _ = contestants[name](batch)
            if index >= WARM_UP:
                times[name].append(time.perf_counter() - began)
            losses[name].append(loss)
    differences = {
        name: max(abs(a - b) / abs(b) for a, b in zip(found, losses["bare"], strict=True))
        for name, found in losses.items()
    }
    return times, differences


def print_table(
    times: dict[str, list[float]], ratios: dict[str, list[float]], differences: dict[str, float], *, title: str
) -> None:
    """Times, ratios with their quartiles, and differences."""
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("loop")
    for heading in ("ms per update", "ratio", "lower quartile", "upper quartile", "loss: max rel. diff."):
        table.add_column(heading, justify="right")
    for name, seconds in times.items():
        lower, median, upper = statistics.quantiles(ratios.get(name, [1.0, 1.0]), n=4)
        table.add_row(
            name,
            f"{1000 * statistics.median(seconds):.1f}",
            f"{median:.3f}",
            f"{lower:.3f}",
            f"{upper:.3f}",
            f"{differences[name]:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
