"""The loader against a bare decoding loop over the same files: seconds of audio per second, scaling, bytes copied.

    python tools/bench/loader.py

FLAC of mini LibriSpeech (synthetic speech where it is missing), again and again. The loader crops, checks, pads, masks
and draws negatives for BASE, and hands micro-batches from its processes to this one; the bare loop is
`soundfile.read`, in as many processes. Both sides alternate; figures are medians.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

# Before torch is imported: loader processes have one thread each, and so has the bare loop.
os.environ["OMP_NUM_THREADS"] = "1"

import soundfile
import typer
from rich.table import Table

from tools.bench.script import console, run_script
from w2vscale.config import load_config
from w2vscale.data.inputs import pack
from w2vscale.data.loading import loader_processes
from w2vscale.data.manifest import Corpus, audio_path
from w2vscale.objectives import build_objective
from w2vscale.training.run import open_training_set

ROOT = Path(__file__).resolve().parents[2]


def main(
    corpus: Annotated[
        Path, typer.Option(help="Mini LibriSpeech; where it is missing, synthetic speech takes its place.")
    ] = ROOT.parent / "shared" / "data" / "LibriSpeech",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side runs.")] = 5,
    micro_batches: Annotated[int, typer.Option(min=10, help="That the loader makes in one round.")] = 60,
    workers: Annotated[list[int] | None, typer.Option(help="Loader processes; repeatable.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    folder: Annotated[Path, typer.Option(help="For the manifest.")] = ROOT / "exp" / "bench" / "loader",
) -> None:
    """Compare, print a table, and JSON as the last line."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # on a machine of two cores
    manifest, source = prepare(corpus, folder)
    cuts = Corpus([manifest])
    files = sorted({audio_path(cuts.cut(number)) for number in range(len(cuts))})
    counts = workers or [0, 1, 2]
    decode(files)  # so that the files are in the page cache for all
    bare: dict[int, list[float]] = {count: [] for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    copied = 0.0
    for _ in range(rounds):
        for count in counts:
            bare[count].append(decode_in_processes(files, count))
            rate, copied = load(manifest, count, micro_batches, setting or [])
            rates[count].append(rate)
    medians = {count: (statistics.median(rates[count]), statistics.median(bare[count])) for count in counts}
    ratios = {
        count: statistics.median(ours / theirs for ours, theirs in zip(rates[count], bare[count], strict=True))
        for count in counts
    }
    table = Table(title=f"{source}, {rounds} rounds", box=None, header_style="bold", title_justify="left")
    for heading in ("processes", "loader, audio seconds per second", "per process", "bare loops", "ratio"):
        table.add_column(heading, justify="right")
    for count, (rate, decoding) in medians.items():
        name = str(count or "this one")
        table.add_row(name, f"{rate:,.0f}", f"{rate / max(count, 1):,.0f}", f"{decoding:,.0f}", f"{ratios[count]:.2f}")
    console.print(table)
    console.print(f"{copied:,.0f} bytes copied per second of audio ({4 * 16_000:,} of it are samples)")
    reference = 1 if 1 in medians else counts[0]
    print(
        json.dumps(
            {
                "audio_seconds_per_second": medians[reference][0] / max(reference, 1),
                "ratio_to_bare_decode": ratios[reference],
                "by_processes": {count: {"loader": ours, "bare": theirs} for count, (ours, theirs) in medians.items()},
                "ratios": ratios,
                "bytes_per_audio_second": copied,
                "cores": os.cpu_count(),
                "data": source,
            }
        )
    )


def prepare(corpus: Path, folder: Path) -> tuple[Path, str]:
    """An indexed manifest, and what it is of."""
    source = "mini LibriSpeech"
    command = [sys.executable, "-m", "w2vscale", "data"]
    if not (corpus / "train-clean-5").is_dir():
        source = "synthetic speech"
        synthesise = ROOT / "recipes" / "demo" / "local" / "synthesise.py"
        subprocess.run([sys.executable, str(synthesise), str(folder)], check=True, stdout=sys.stderr)
        corpus = folder / "LibriSpeech"
    subprocess.run(
        [*command, "prepare", "mini_librispeech", str(corpus), str(folder), "--part", "train-clean-5"],
        check=True,
        stdout=sys.stderr,
    )
    manifest = folder / "cuts_train-clean-5.jsonl"
    subprocess.run([*command, "index", str(manifest)], check=True, stdout=sys.stderr)
    return manifest, source


def decode(files: list[str]) -> float:
    """Seconds of audio per second of a loop that does nothing but decode."""
    began = time.perf_counter()
    seconds = 0.0
    for path in files:
        audio, rate = soundfile.read(path, dtype="float32")
        seconds += len(audio) / rate
    return seconds / (time.perf_counter() - began)


def decode_in_processes(files: list[str], count: int) -> float:
    """Seconds of audio per second of `count` such loops side by side; of one in this process if it is 0."""
    if not count:
        return decode(files)
    with multiprocessing.get_context("fork").Pool(count) as pool:
        pool.map(decode, [files[:1]] * count, chunksize=1)  # so that all have started
        return sum(pool.map(decode, [files] * count, chunksize=1))


def load(manifest: Path, workers: int, micro_batches: int, settings: list[str]) -> tuple[float, float]:
    """Seconds of audio per second from the loader, and bytes per second of audio.

    The clock starts with the first micro-batch, when the processes run.
    """
    fixed = [f"data.train={manifest}", f"data.workers={workers}", "batch.micro_batches=1"]
    config = load_config("base", [*fixed, *settings])
    dataset = open_training_set(config, build_objective(config))
    samples = 0
    began = time.perf_counter()
    with loader_processes():
        # Without end, so that the processes never run out of work before the clock stops.
        for done, (batch,) in enumerate(dataset.windows(range(10**9), micro_batches=1, rank=0, world_size=1)):
            if done == 0:
                began = time.perf_counter()
                continue
            samples += batch.audio_samples
            if done == micro_batches:
                break
        elapsed = time.perf_counter() - began
    rate = config.model.sampling_rate
    bytes_per_second = pack(batch.inputs)[0].numel() / (batch.audio_samples / rate)
    return samples / rate / elapsed, bytes_per_second


if __name__ == "__main__":
    run_script(main)
