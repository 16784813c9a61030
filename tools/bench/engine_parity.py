"""One real run under every engine, changing one setting: the same losses and norms, less memory from stage to stage.

    python tools/bench/engine_parity.py

`tiny` trains on mini LibriSpeech, from the command line, in two processes (one on a machine with a single GPU), once
per engine. Since a Python process is large against `tiny`, memory is that of a model of BASE's size under the same
engines (tools/bench/engine_memory.py).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tools.bench.plan_memory import ENGINES, measure
from tools.bench.script import console, run_script

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

PROCESSES = 1 if torch.cuda.device_count() == 1 else 2
SETTINGS = (
    "batch.micro_batches=4",  # two or four per process, so that gradients accumulate
    "batch.max_seconds=10",
    "schedule.warmup_updates=10",
    "logging.every=1",
    "logging.tensorboard=false",
)
"""What all runs change of the preset `tiny`."""

BUFFERS = {
    "reduce_bucket_size": 5_000_000,
    "allgather_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_max_reuse_distance": 0,
}
"""Elements, where memory is measured. Those of ds_configs/ are for larger models: of BASE they would hide what is
sharded, since 50 million elements are half of it and ZeRO-3 would keep all of it gathered."""

GIB = 2**30


@dataclass(frozen=True)
class Curve:
    """Figures of each update of one run, and what it left behind."""

    losses: list[float]
    norms: list[float]
    checkpoint_bytes: int
    seconds: float


def main(
    corpus: Annotated[
        Path, typer.Option(help="Mini LibriSpeech; where it is missing, synthetic speech takes its place.")
    ] = ROOT.parent / "shared" / "data" / "LibriSpeech",
    updates: Annotated[int, typer.Option(min=10, help="Of each training run.")] = 30,
    folder: Annotated[Path, typer.Option(help="Emptied first; for manifests, runs and logs.")] = ROOT
    / "exp"
    / "bench"
    / "engine_parity",
) -> None:
    """Compare all engines on the same run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest, source = prepare(corpus, folder)
    curves = {name: train(name, manifest, updates, folder) for name in ENGINES}
    memory = {name: measure_memory(name, folder) for name in ENGINES}
    engines: dict[str, dict[str, Any]] = {
        name: {
            "max_relative_loss_difference": relative_difference(curve.losses, curves["ddp"].losses),
            "max_relative_norm_difference": relative_difference(curve.norms, curves["ddp"].norms),
            "checkpoint_bytes": curve.checkpoint_bytes,
            "peak_bytes": memory[name]["peak"],
            "predicted_peak_bytes": memory[name]["predicted"],
            "memory": memory[name],
        }
        for name, curve in curves.items()
    }
    print_engines(curves, engines, title=f"tiny, {source}, {updates} updates, {PROCESSES} processes")
    print_memory(memory)
    worst = {
        f"max_relative_{kind}_difference": max(one[f"max_relative_{kind}_difference"] for one in engines.values())
        for kind in ("loss", "norm")
    }
    print(json.dumps({**worst, "data": source, "updates": updates, "engines": engines}))


def prepare(corpus: Path, folder: Path) -> tuple[Path, str]:
    """An indexed manifest of the training part, and what it is of."""
    source = "mini LibriSpeech"
    if not (corpus / "train-clean-5").is_dir():
        source = "synthetic speech"
        console.print(f"{corpus} has no train-clean-5: synthetic speech takes its place", markup=False)
        run([PYTHON, str(ROOT / "recipes" / "demo" / "local" / "synthesise.py"), str(folder)], folder / "data.log")
        corpus = folder / "LibriSpeech"
    manifests = folder / "manifests"
    run(
        [PYTHON, "-m", "w2vscale", "data", "prepare", "mini_librispeech", str(corpus), str(manifests), "--jobs", "2"],
        folder / "data.log",
    )
    manifest = manifests / "cuts_train-clean-5.jsonl"
    run([PYTHON, "-m", "w2vscale", "data", "index", str(manifest)], folder / "data.log")
    return manifest, source


def train(name: str, manifest: Path, updates: int, folder: Path) -> Curve:
    """One run under engine `name`, by the command that a user would type."""
    exp = folder / name
    settings = [f"data.train={manifest}", *SETTINGS, f"trainer.updates={updates}"]
    launch = ["--exp", str(exp), "--nproc-per-node", str(PROCESSES)]
    began = time.perf_counter()
    run([PYTHON, "-m", "w2vscale", "train", "tiny", *settings, ENGINES[name], *launch], folder / f"{name}.log")
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    assert [line["update"] for line in training] == list(range(1, updates + 1))
    checkpoint = (exp / "checkpoints" / f"update_{updates:08d}").resolve(strict=True)
    return Curve(
        losses=[line["loss"] for line in training],
        norms=[line["grad_norm"] for line in training],
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
        seconds=seconds,
    )


def measure_memory(name: str, folder: Path) -> dict[str, Any]:
    """What tools/bench/engine_memory.py finds under engine `name`."""
    setting = ENGINES[name]
    if name.startswith("zero"):
        tree = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        zero = tree["zero_optimization"]
        zero |= {key: elements for key, elements in BUFFERS.items() if key in zero}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(tree))
        setting = f"engine={{name: deepspeed, deepspeed_config: {path}}}"
    return measure(["--preset", "base", "precision.compute=fp32", setting], processes=PROCESSES)


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command in the checkout; its output goes to `log`. Ends the program if it fails."""
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    with log.open("ab") as output:
        finished = subprocess.run(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=output, stderr=subprocess.STDOUT
        )
    if finished.returncode:
        sys.exit(f"{log.read_text(errors='replace')[-3000:]}\nfailed with code {finished.returncode}; all of it: {log}")


def relative_difference(found: list[float], expected: list[float]) -> float:
    """The largest |found - expected| / |expected|."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def print_engines(curves: dict[str, Curve], engines: dict[str, dict[str, Any]], *, title: str) -> None:
    """First and last figures of each run, the largest differences from DDP's over all updates, and sizes."""
    last = len(curves["ddp"].losses)
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("engine")
    for heading in (
        f"loss 1 … {last}", "max rel. diff.", f"norm 1 … {last}", "max rel. diff.", "checkpoint bytes", "seconds",
        "peak GiB*", "predicted*",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, curve in curves.items():
        figures = engines[name]
        table.add_row(
            name,
            f"{curve.losses[0]:.6f} … {curve.losses[-1]:.6f}",
            f"{figures['max_relative_loss_difference']:.1e}",
            f"{curve.norms[0]:.5f} … {curve.norms[-1]:.6f}",
            f"{figures['max_relative_norm_difference']:.1e}",
            f"{curve.checkpoint_bytes:,}",
            f"{curve.seconds:.0f}",
            f"{figures['peak_bytes'] / GIB:.2f}",
            f"{figures['predicted_peak_bytes'] / GIB:.2f}",
        )
    console.print(table)
    console.print("* of a model of BASE's size, per rank")


def print_memory(memory: dict[str, dict[str, Any]]) -> None:
    """Each kind's bytes per parameter on a rank, between the last backward and the step, and what was predicted."""
    parameters = memory["ddp"]["parameters"]
    title = f"\nBytes per parameter and rank (predicted): BASE, {parameters:,} parameters, fp32, {PROCESSES} processes"
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("engine")
    kinds = ("parameters", "masters", "gradients", "moments")
    for heading in (*kinds, "these together", "resident", "peak"):
        table.add_column(heading, justify="right")
    for name, figures in memory.items():
        held, predicted = figures["held"], figures["predicted_held"]
        rows = [(held[kind], predicted[kind]) for kind in kinds]
        rows.append((sum(held[kind] for kind in kinds), sum(predicted.values())))
        table.add_row(
            name,
            *(f"{found / parameters:.2f} ({expected / parameters:.2f})" for found, expected in rows),
            f"{figures['resident'] / parameters:.2f}",
            f"{figures['peak'] / parameters:.2f} ({figures['predicted'] / parameters:.2f})",
        )
    console.print(table)


if __name__ == "__main__":
    run_script(main)
