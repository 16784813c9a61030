"""What it costs to verify a checkpoint before a run continues from it.

    python tools/bench/verification.py
    python tools/bench/verification.py --gigabytes 4 --files 8

Writes a checkpoint as several ranks do, and measures how long one process takes to open it, with and without comparing
the checksums, and to read it. The files are in the page cache; a disk adds the time of its first read, which reading
alone would also take.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.bench.script import console, run_script
from w2vscale.checkpoint.format import Document, TrainState, encode, file_facts, folder_name
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.files import write_text
from w2vscale.optim.canonical import TensorSpec


def verification(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint in GB.")] = 1.0,
    files: Annotated[int, typer.Option(min=1, help="Number of its files with tensors.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements; the median counts.")] = 5,
) -> None:
    """Measure the cost of comparing the checksums of a checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="verification-"))
    try:
        path = _write(folder, round(gigabytes * 1e9 / files), files)
        seconds = {
            "open": _median(lambda: open_checkpoint(path, hashed=False), repeats),
            "open and verify": _median(lambda: open_checkpoint(path), repeats),
            "read": _median(lambda: _read(path), repeats),
        }
    finally:
        shutil.rmtree(folder)
    for name, value in seconds.items():
        console.print(f"{name:16} {value:7.3f} s")
    cost = seconds["open and verify"] - seconds["open"]
    found = {"seconds_per_gb": cost / gigabytes, "gb": gigabytes, "files": files, "threads": torch.get_num_threads()}
    console.print(json.dumps({name: round(value, 4) for name, value in found.items()}))


def _write(folder: Path, size: int, files: int) -> Path:
    path = folder / folder_name(1)
    path.mkdir()
    for number in range(1, files + 1):
        values = torch.randn(size // 4)
        with (path / f"shard-{number:05d}-model-00001-of-{files:05d}.safetensors").open("wb") as file:
            write_safetensors(file, {f"model.{number}": TensorSpec((values.numel(),))}, [values])
    write_text(path / "config.yaml", "model: {}\n")
    facts = {file.name: file_facts(file) for file in path.iterdir()}
    write_text(path / "train_state.json", encode(Document(TrainState(update=1), facts, files)))
    return path


def _read(path: Path) -> None:
    checkpoint = open_checkpoint(path, hashed=False)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)


def _median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    run_script(verification)
