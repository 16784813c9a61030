"""One real run under every engine, changing one setting: the same losses and norms, less memory from stage to stage.

    python tools/bench/engine_parity.py

First `tiny` trains on mini LibriSpeech, from the command line, in two processes, once per engine. Then a model of
BASE's size, against which a Python process is small, takes three updates under every engine, and the peak of each
rank's memory stands beside what the theory says (tools/bench/engine_memory.py).
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

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

ENGINES = {
    "ddp": "engine.name=ddp",
    "fsdp": "engine.name=fsdp",
    "zero1": "engine={name: deepspeed, deepspeed_config: zero1}",
    "zero2": "engine={name: deepspeed, deepspeed_config: zero2}",
    "zero3": "engine={name: deepspeed, deepspeed_config: zero3}",
}
"""The one setting in which the runs differ."""

PROCESSES = 2
SETTINGS = (
    "batch.micro_batches=4",  # two per process, so that gradients accumulate
    "batch.max_seconds=20",
    "schedule.warmup_updates=10",
    "logging.every=1",
    "logging.tensorboard=false",
)
"""What all runs change of the preset `tiny`."""

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)


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
    memory: Annotated[bool, typer.Option(help="Measure memory too.")] = True,
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
    losses = {name: relative_difference(curve.losses, curves["ddp"].losses) for name, curve in curves.items()}
    norms = {name: relative_difference(curve.norms, curves["ddp"].norms) for name, curve in curves.items()}
    print_curves(curves, losses, norms, title=f"tiny, {source}, {updates} updates, {PROCESSES} processes")
    engines: dict[str, dict[str, Any]] = {
        name: {
            "max_relative_loss_difference": losses[name],
            "max_relative_norm_difference": norms[name],
            "checkpoint_bytes": curve.checkpoint_bytes,
        }
        for name, curve in curves.items()
    }
    if memory:
        measured = {name: measure_memory(name, folder) for name in ENGINES}
        print_memory(measured)
        for name, figures in measured.items():
            engines[name]["memory"] = figures
    print(
        json.dumps(
            {
                "max_relative_loss_difference": max(losses.values()),
                "max_relative_norm_difference": max(norms.values()),
                "data": source,
                "updates": updates,
                "engines": engines,
            }
        )
    )


def prepare(corpus: Path, folder: Path) -> tuple[Path, str]:
    """An indexed manifest of the training part, and what it is of."""
    source = "mini LibriSpeech"
    if not (corpus / "train-clean-5").is_dir():
        source = "synthetic speech"
        console.print(f"{corpus} has no train-clean-5: synthetic speech takes its place", markup=False)
        run([PYTHON, "-m", "w2vscale", "data", "synth", str(folder)], folder / "data.log")
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
    result = folder / f"{name}_memory.json"
    run(
        [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES),
         str(Path(__file__).with_name("engine_memory.py")), str(result), ENGINES[name]],
        folder / f"{name}_memory.log",
        # What is freed goes back to the system, so that resident memory is what is in use.
        {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


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


def print_curves(curves: dict[str, Curve], losses: dict[str, float], norms: dict[str, float], *, title: str) -> None:
    """First and last figures of each run, the largest differences from DDP's over all updates, and checkpoints."""
    updates = len(curves["ddp"].losses)
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    table.add_column("engine")
    shown = sorted({1, updates // 2, updates})
    for heading in (
        *(f"loss {update}" for update in shown),
        *(f"norm {update}" for update in shown),
        "loss: max rel. diff.",
        "norm: max rel. diff.",
        "checkpoint bytes",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for name, curve in curves.items():
        table.add_row(
            name,
            *(f"{curve.losses[update - 1]:.6f}" for update in shown),
            *(f"{curve.norms[update - 1]:.6f}" for update in shown),
            f"{losses[name]:.1e}",
            f"{norms[name]:.1e}",
            f"{curve.checkpoint_bytes:,}",
            f"{curve.seconds:.0f}",
        )
    console.print(table)


def print_memory(measured: dict[str, dict[str, Any]]) -> None:
    """Bytes per parameter on rank 0: what the engine holds, and the peak of its process, beside the prediction."""
    kinds = ("parameters", "masters", "gradients", "moments")
    table = Table(
        title=f"BASE, fp32, {PROCESSES} processes: bytes per parameter on a rank, measured / predicted",
        box=None,
        header_style="bold",
        title_justify="left",
    )
    table.add_column("engine")
    for heading in (*kinds, "peak"):
        table.add_column(heading, justify="right")
    for name, figures in measured.items():
        found = {**figures["held"], "peak": figures["peak"]}
        cells = [f"{found[key]:.2f} / {figures['predicted'][key]:.2f}" for key in (*kinds, "peak")]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
