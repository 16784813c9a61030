"""A stream of shards against an index of files and a bare decoding loop, in seconds of audio per second.

    python tools/bench/stream.py
    python tools/bench/stream.py --shards SHARDS --processes 0

FLAC of mini LibriSpeech (synthetic speech where it is missing), as files and as shards, again and again. Stream and
index decode, check, crop, pad and draw masks and negatives for BASE in whole updates; the bare loop reads the archives
in sequence and decodes their members with `soundfile.read`, in as many processes. The sides alternate. With `--shards`,
the stream reads shards of your own, and there is no index beside them. Figures are medians, also of the seconds from
opening the data to the first update, and of the padding.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from typing import Annotated

# Before torch is imported: loader processes have one thread each, and so has the bare loop.
os.environ["OMP_NUM_THREADS"] = "1"

import soundfile
import typer
from rich.table import Table

from tools.bench.loader import ROOT, prepare
from tools.bench.script import console, run_script
from w2vscale.config import load_config
from w2vscale.data.loading import loader_processes
from w2vscale.data.shards import find_shards
from w2vscale.objectives import build_objective
from w2vscale.training.run import open_training_set


def main(
    shards: Annotated[Path | None, typer.Option(help="A folder of indexed shards; default: mini LibriSpeech.")] = None,
    corpus: Annotated[
        Path, typer.Option(help="Mini LibriSpeech; where it is missing, synthetic speech takes its place.")
    ] = ROOT.parent / "shared" / "data" / "LibriSpeech",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side runs.")] = 5,
    updates: Annotated[int, typer.Option(min=1, help="Updates that are loaded in a round, after the first.")] = 10,
    processes: Annotated[int, typer.Option(min=0, help="Loader processes; 0: this one.")] = 1,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    folder: Annotated[Path, typer.Option(help="For manifest and shards.")] = ROOT / "exp" / "bench" / "stream",
) -> None:
    """Compare, print a table, and JSON as the last line."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # on a machine of few cores
    settings = ["batch.micro_batches=32", *(setting or [])]
    sides: dict[str, list[str]] = {}
    source = str(shards)
    if shards is None:
        manifest, source = prepare(corpus, folder)
        shards = write_shards(manifest, folder / "shards")
        sides["index"] = [f"data.train={manifest}", *settings]
    sides["stream"] = [f"data.train={shards}", "data.mode=stream", *settings]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in (*sides, "bare loop")}
    for _ in range(rounds):
        for side, config in sides.items():
            found[side].append(load(config, processes, updates))
        found["bare loop"].append({"rate": decode_in_processes(shards, processes)})
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()
    }
    ratios = {
        side: statistics.median(
            ours["rate"] / theirs["rate"] for ours, theirs in zip(found["stream"], found[side], strict=True)
        )
        for side in found
        if side != "stream"
    }
    table = Table(title=f"{source}, {rounds} rounds", box=None, header_style="bold", title_justify="left")
    for heading in ("side", "audio seconds per second", "stream / side", "first update after (s)", "padding"):
        table.add_column(heading, justify="right")
    for side, figures in medians.items():
        more = [f"{figures['first']:.2f}", f"{figures['padding']:.2%}"] if side in sides else ["", ""]
        table.add_row(side, f"{figures['rate']:,.0f}", f"{ratios[side]:.2f}" if side in ratios else "", *more)
    console.print(table)
    print(json.dumps({"medians": medians, "ratios": ratios, "processes": processes, "cores": os.cpu_count()}))


def write_shards(manifest: Path, folder: Path) -> Path:
    """Write FLAC shards of 25 utterances."""
    command = [sys.executable, "-m", "w2vscale", "data", "shar", str(manifest), str(folder), "--shard-size", "25"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def load(settings: list[str], processes: int, updates: int) -> dict[str, float]:
    """Measure `updates` updates of a loader after the first one."""
    opened = time.perf_counter()
    config = load_config("base", [f"data.workers={processes}", *settings])
    dataset = open_training_set(config, build_objective(config))
    samples = padded = 0
    began = opened
    with loader_processes():
        # Without end, so that the processes never run out of work before the clock stops.
        windows = dataset.windows(range(10**9), micro_batches=config.batch.micro_batches, rank=0, world_size=1)
        for done, window in enumerate(windows):
            if done == 0:
                began = time.perf_counter()
                continue
            samples += sum(batch.audio_samples for batch in window)
            padded += sum(batch.padded_samples for batch in window)
            if done == updates:
                break
        elapsed = time.perf_counter() - began
    rate = samples / config.model.sampling_rate / elapsed
    return {"rate": rate, "first": began - opened, "padding": 1 - samples / padded}


def decode(folder: Path) -> float:
    """Seconds of audio per second of a loop that does nothing but read archives and decode."""
    began = time.perf_counter()
    seconds = 0.0
    for shard in find_shards(folder):
        with tarfile.open(shard.recording, "r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and not member.name.endswith(".json"):
                    audio, rate = soundfile.read(io.BytesIO(content.read()), dtype="float32")
                    seconds += len(audio) / rate
    return seconds / (time.perf_counter() - began)


def decode_in_processes(folder: Path, count: int) -> float:
    """Seconds of audio per second of `count` such loops side by side; of one in this process if it is 0."""
    if not count:
        return decode(folder)
    with multiprocessing.get_context("fork").Pool(count) as pool:
        pool.map(time.sleep, [0.1] * count, chunksize=1)  # so that all have started
        return sum(pool.map(decode, [folder] * count, chunksize=1))


if __name__ == "__main__":
    run_script(main)
