"""What `w2vscale train` adds to its steps: a run with loader, metrics and checkpoints against the same steps alone.

    python tools/bench/end_to_end.py CUTS.jsonl                            `tiny` on an indexed manifest
    python tools/bench/end_to_end.py CUTS.jsonl --preset base --updates 8 trainer.validate_every=1000

Runs and bare loops alternate. A run is the command in a process of its own; its rate is taken from its first logged
update to the end of its last checkpoint. The bare loop here trains on the same micro-batches, read beforehand, in the
same engine, and does nothing else.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.bench.running import build
from tools.bench.script import console, run_script
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.optim.schedules import learning_rate
from w2vscale.training.calibration import forward_size

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.005
"""Seconds between two looks at a run's log."""


def main(
    cuts: Annotated[Path, typer.Argument(metavar="CUTS.jsonl", help="An indexed manifest.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
    preset: Annotated[str, typer.Option(help="Whose settings.")] = "tiny",
    updates: Annotated[int, typer.Option(min=4, help="Of a run.")] = 60,
    every: Annotated[int, typer.Option(min=1, help="Updates between two log lines.")] = 10,
    checkpoints: Annotated[int, typer.Option(min=1, help="Of a run, the last at its end.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of a run and a bare loop.")] = 3,
    folder: Annotated[Path, typer.Option(help="Emptied first.")] = ROOT / "exp" / "bench" / "end_to_end",
) -> None:
    """Compare runs with their steps alone."""
    overrides = [
        f"data.train={cuts.resolve()}",
        f"trainer.updates={updates}",
        f"logging.every={every}",
        f"checkpoint.every={-(-updates // checkpoints)}",
        "schedule.warmup_updates=1",
        *(settings or []),
    ]
    if updates <= every:
        raise UserError(f"--updates {updates}: no more than --every {every}, of which the first are not counted")
    config = load_config(preset, overrides)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runs, loops, waited = [], [], []
    for number in range(rounds):
        rate, share = measure_run([preset, *overrides], folder / f"run{number}")
        runs.append(rate)
        waited.append(share)
        loops.append(measure_loop(config, first=every))
        console.print(f"round {number}: run {runs[-1]:.2f}, steps alone {loops[-1]:.2f} seconds of audio a second")
    ratio = statistics.median(run / loop for run, loop in zip(runs, loops, strict=True))
    waiting = statistics.median(waited)
    console.print(f"a run reaches {ratio:.1%} of its steps' rate; {waiting:.2%} of its time it waits for data")
    document = {"preset": preset, "updates": updates, "checkpoints": checkpoints, "runs": runs, "loops": loops}
    print(json.dumps({**document, "waited": waited, "ratio": ratio}))


def measure_run(arguments: list[str], exp: Path) -> tuple[float, float]:
    """Seconds of audio a second of a run, and the share of the time that it waited for data."""
    command = [sys.executable, "-m", "w2vscale", "train", *arguments, "--exp", str(exp)]
    metrics = exp / "metrics.jsonl"
    with exp.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
                time.sleep(POLL)
            began = time.time()
            process.wait()
        finally:
            process.kill()
    if process.returncode:
        sys.exit(f"{exp.with_suffix('.log').read_text()[-2000:]}\nthe run failed; all of it: {exp.with_suffix('.log')}")
    seconds = (exp / "checkpoints" / "latest" / "train_state.json").stat().st_mtime - began
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    audio = 3600 * (training[-1]["hours_seen"] - training[0]["hours_seen"])
    return audio / seconds, statistics.mean(line["data_wait_fraction"] for line in training[1:])


def measure_loop(config: Config, *, first: int) -> float:
    """Seconds of audio a second of the steps alone, after the `first`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = build(config, device)
    per_forward = forward_size(
        config.batch, setup.engine, setup.objective, setup.training_set,
        world_size=1, device=device, log=lambda text: None,
    )  # fmt: skip
    windows = setup.training_set.windows(
        range(config.trainer.updates), micro_batches=config.batch.micro_batches, rank=0, world_size=1
    )
    audio, seconds = 0.0, 0.0
    for update, window in enumerate(list(windows)):
        began = time.perf_counter()
        weight = float(max(sum(batch.weight for batch in window), 1))
        setup.window(window, weight, update=update, per_forward=per_forward)
        lr = learning_rate(update, optim=config.optim, schedule=config.schedule, updates=config.trainer.updates)
        float(setup.step(lr, config.optim.max_norm))  # waits for the device
        if update >= first:
            seconds += time.perf_counter() - began
            audio += sum(batch.audio_samples for batch in window) / config.model.sampling_rate
    setup.engine.close()
    return audio / seconds


if __name__ == "__main__":
    run_script(main)
