"""What the engine costs over a bare PyTorch loop of the same arithmetic, in one process.

    python tools/bench/engine_overhead.py

Both sides have a `tiny` of the same initial values and take the same micro-batches, update by update in turns: what
disturbs one disturbs the other. The ratio is the median over pairs of updates of engine time by bare time.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from w2vscale.config import Config, load_config
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.distributed.process_group import process_group
from w2vscale.engine import build_engine
from w2vscale.engine.criterion import PretrainingCriterion
from w2vscale.models.layers import compute_dtype
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining
from w2vscale.training.run import empty_model, initial_values

SECONDS = (2.0, 2.0, 1.5)
"""Lengths of the utterances of one micro-batch."""

MICRO_BATCHES = 2
LR = 1e-4

Update = Callable[[list[MicroBatch]], float]


def main(
    pairs: Annotated[int, typer.Option(min=3, help="Updates of each side.")] = 60,
    engine: Annotated[str, typer.Option(help="As in engine.name=…; with deepspeed also deepspeed_config.")] = "ddp",
) -> None:
    """Measure, and print the ratio."""
    config = load_config(
        "tiny",
        [f"batch.micro_batches={MICRO_BATCHES}", f"engine={engine if engine[0] == '{' else f'{{name: {engine}}}'}"],
    )
    with process_group(needed=config.engine.name != "ddp") as (_, device):
        sides = {"bare": bare_loop(config, device), "engine": engine_loop(config, device)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for update in range(-3, pairs):  # the first ones warm up
            window = [micro_batch(config, update + 3, index) for index in range(MICRO_BATCHES)]
            losses = {}
            for name in sorted(sides, reverse=bool(update % 2)):
                began = time.perf_counter()
                losses[name] = sides[name](window)
                if update >= 0:
                    seconds[name].append(time.perf_counter() - began)
            assert abs(losses["engine"] / losses["bare"] - 1) < 1e-4, losses
    ratios = [ours / bare for ours, bare in zip(seconds["engine"], seconds["bare"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    table = Table(title=f"{engine}, tiny, one process, {pairs} pairs of updates", box=None, title_justify="left")
    for heading in ("bare ms", "engine ms", "ratio", "quartiles"):
        table.add_column(heading, justify="right")
    table.add_row(
        *(f"{1000 * statistics.median(seconds[name]):.1f}" for name in ("bare", "engine")),
        f"{median:.4f}",
        f"{low:.3f} … {high:.3f}",
    )
    Console().print(table)
    print(json.dumps({"ratio": median, "quartiles": [low, high], "pairs": pairs, "engine": engine}))


def bare_loop(config: Config, device: torch.device) -> Update:
    """Forward, backward, clipping and fused AdamW, written out."""
    model = Wav2Vec2ForPretraining(config.model, compute_dtype(config.precision)).to(device)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_values(config):
            own[name].copy_(value)
    scaled = [name for name in own for group in config.optim.groups if re.search(group.pattern, name)]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in own.items():
        decay = config.optim.weight_decay if sum(size > 1 for size in parameter.shape) > 1 else 0.0
        scale = config.optim.groups[0].lr_scale if name in scaled else 1.0
        groups.setdefault((scale, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": LR * scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        betas=config.optim.betas,
        eps=config.optim.eps,
        fused=True,
    )
    criterion = PretrainingCriterion(config.model, seed=config.trainer.seed)

    def update(window: list[MicroBatch]) -> float:
        model.train()
        masked = sum(batch.masked for batch in window)
        total = 0.0
        for batch in window:
            sums = criterion(model, [batch], device=device, training=True)
            (sums.total / masked).backward()
            total += float(sums.total.detach())
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_norm or float("inf"), foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return total / masked

    return update


def engine_loop(config: Config, device: torch.device) -> Update:
    """The same by the engine."""
    engine = build_engine(
        empty_model(config), PretrainingCriterion(config.model, seed=config.trainer.seed), config, device
    )
    engine.import_parameters(initial_values(config))

    def update(window: list[MicroBatch]) -> float:
        masked = sum(batch.masked for batch in window)
        sums = engine.run_window(window, torch.tensor(float(masked)))
        engine.step(lr=LR, max_norm=config.optim.max_norm)
        return float(sums.total) / masked

    return update


def micro_batch(config: Config, update: int, index: int) -> MicroBatch:
    """Noise, in utterances of two lengths."""
    number = MICRO_BATCHES * update + index
    draws = np.random.default_rng(number)
    waveforms = [
        draws.standard_normal(int(seconds * config.model.sampling_rate), dtype=np.float32) for seconds in SECONDS
    ]
    inputs = make_inputs(waveforms, list(range(len(waveforms))), number=number, seed=0, config=config.model)
    return MicroBatch(update=update, number=number, inputs=inputs, audio_samples=sum(map(len, waveforms)))


if __name__ == "__main__":
    typer.run(main)
