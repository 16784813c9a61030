"""What recomputing activations saves and costs: seconds of audio per GB, and per second.

    python tools/bench/activations.py                              `base`, 2 utterances of 10 s, fp32

For each value of engine.activation_checkpointing: the most that a forward and backward of a micro-batch has allocated
beside the parameters and their gradients, tensor by tensor; and the time of a step, in turn, as the median.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, get_args

import torch
import typer
from rich.table import Table

from tools.bench.contenders import Work, synchronize, work_settings
from tools.bench.running import build
from tools.bench.script import console, run_script
from w2vscale.config.running import EngineConfig
from w2vscale.planning.live_memory import LiveMemory

CHOICES: tuple[str, ...] = get_args(EngineConfig.model_fields["activation_checkpointing"].annotation)


def main(
    preset: Annotated[str, typer.Option(help="Whose model.")] = "base",
    utterances: Annotated[int, typer.Option(min=1, help="Of a micro-batch.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of an utterance.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each that are timed.")] = 3,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
) -> None:
    """Measure each value of engine.activation_checkpointing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engines, memory = {}, {}
    for choice in CHOICES:
        fixed = f"engine.activation_checkpointing={choice}"
        config = work_settings(preset, ["precision.compute=fp32", *(settings or []), fixed])
        batch = Work(config, utterances, seconds).batch()
        setup = build(config, device)
        setup.window([batch], float(batch.weight))  # gradients are there from here on
        with LiveMemory() as counted:
            setup.window([batch], float(batch.weight))
        engines[choice], memory[choice] = setup, counted.peak
    times: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for _ in range(rounds):
        for choice, setup in engines.items():
            began = time.perf_counter()
            setup.window([batch], float(batch.weight))
            setup.step(1e-5)
            synchronize(device)
            times[choice].append(time.perf_counter() - began)
    audio = utterances * seconds
    figures = {
        choice: {
            "bytes": memory[choice],
            "audio_seconds_per_gb": audio / memory[choice] * 1e9,
            "step_seconds": statistics.median(times[choice]),
            "relative_time": statistics.median(a / b for a, b in zip(times[choice], times["none"], strict=True)),
        }
        for choice in CHOICES
    }
    table = Table(title=f"{preset}, {utterances} utterances of {seconds:g} s", box=None, title_justify="left")
    for heading in ("activation_checkpointing", "MiB", "seconds of audio per GB", "step, s", "times as long"):
        table.add_column(heading, justify="left" if heading.startswith("act") else "right")
    for choice, one in figures.items():
        table.add_row(
            choice,
            f"{one['bytes'] / 2**20:.0f}",
            f"{one['audio_seconds_per_gb']:.1f}",
            f"{one['step_seconds']:.2f}",
            f"{one['relative_time']:.2f}",
        )
    console.print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    run_script(main)
