"""What `precision.reduce=bf16` changes in a loss curve, beside what another seed changes, and the bytes that it saves.

    python tools/bench/gradient_reduction.py

`tiny` trains on mini LibriSpeech with the recipe's quick settings, from the command line, in two processes: with
gradients summed in fp32 and in bf16, from two seeds, computing in fp32 and in bf16. Bytes are counted in one update of
each engine (tools/bench/sent_bytes.py).
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.table import Table

from tools.bench.engine_parity import ENGINES, PYTHON, ROOT, prepare, run
from tools.bench.script import console, run_script

PROCESSES = 2
CONFIG = ROOT / "recipes" / "mini_librispeech" / "conf" / "quick.yaml"
SETTINGS = (
    "batch.micro_batches=2",
    "batch.max_seconds=10",
    "logging.every=1",
    "logging.tensorboard=false",
    "checkpoint.keep_last=1",
    "engine.name=ddp",
)
"""What all runs change of the recipe."""

REDUCED = ("fp32", "bf16")
SEEDS = (0, 1)
LAST = 50  # updates over which the end of a curve is averaged


@dataclass(frozen=True)
class Curve:
    """The training loss of every update, and what the last validation found."""

    losses: list[float]
    validation: dict[str, float]

    @property
    def end(self) -> float:
        """The mean training loss of the last updates."""
        return fmean(self.losses[-LAST:])


def main(
    corpus: Annotated[
        Path, typer.Option(help="Mini LibriSpeech; where it is missing, synthetic speech takes its place.")
    ] = ROOT.parent / "shared" / "data" / "LibriSpeech",
    updates: Annotated[int, typer.Option(min=LAST, help="Number of updates of each training run.")] = 200,
    compute: Annotated[list[str] | None, typer.Option(help="precision.compute; repeatable. Default: both.")] = None,
    folder: Annotated[Path, typer.Option(help="Emptied first; for manifests, runs and logs.")] = ROOT
    / "exp"
    / "bench"
    / "gradient_reduction",
) -> None:
    """Compare curves with gradients summed in fp32 and in bf16."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sent = {name: {reduced: count_bytes(name, reduced, folder) for reduced in REDUCED} for name in ENGINES}
    print_bytes(sent)
    manifest, source = prepare(corpus, folder)
    validation = manifest.with_name("cuts_dev-clean-2.jsonl")
    run([PYTHON, "-m", "w2vscale", "data", "index", str(validation)], folder / "data.log")
    found: dict[str, Any] = {}
    for computing in compute or ["fp32", "bf16"]:
        curves = {
            (reduced, seed): train(computing, reduced, seed, updates, manifest, validation, folder)
            for seed, reduced in itertools.product(SEEDS, REDUCED)
        }
        found[computing] = compare(curves)
        print_curves(curves, found[computing], title=f"tiny, {source}, {updates} updates, compute={computing}")
    print(json.dumps({"data": source, "updates": updates, "sent_bytes": sent, "compute": found}))


def train(
    computing: str, reduced: str, seed: int, updates: int, manifest: Path, validation: Path, folder: Path
) -> Curve:
    """One run, by the command that a user would type."""
    name = f"{computing}-{reduced}-{seed}"
    settings = [
        f"data.train={manifest}", f"data.validation={validation}", *SETTINGS, f"trainer.updates={updates}",
        f"trainer.validate_every={updates}", f"checkpoint.every={updates}", f"trainer.seed={seed}",
        f"precision.compute={computing}", f"precision.reduce={reduced}",
    ]  # fmt: skip
    launch = ["--exp", str(folder / name), "--nproc-per-node", str(PROCESSES)]
    run([PYTHON, "-m", "w2vscale", "train", str(CONFIG), *settings, *launch], folder / f"{name}.log")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == updates
    last = [line for line in lines if line["split"] != "train"][-1]
    return Curve(losses, {key: float(value) for key, value in last.items() if isinstance(value, float)})


def compare(curves: dict[tuple[str, int], Curve]) -> dict[str, dict[str, float]]:
    """Mean relative differences of three figures: between the two settings, and between the two seeds."""
    pairs = {
        "between_settings": [(curves["fp32", seed], curves["bf16", seed]) for seed in SEEDS],
        "between_seeds": [(curves[reduced, SEEDS[0]], curves[reduced, SEEDS[1]]) for reduced in REDUCED],
    }
    return {
        kind: {
            "each_update": fmean(
                relative(one, other) for a, b in found for one, other in zip(a.losses, b.losses, strict=True)
            ),
            "end": fmean(relative(a.end, b.end) for a, b in found),
            "validation_loss": fmean(relative(a.validation["loss"], b.validation["loss"]) for a, b in found),
        }
        for kind, found in pairs.items()
    }


def relative(one: float, other: float) -> float:
    """The difference of two positive numbers as a share of their mean."""
    return 2.0 * abs(one - other) / (one + other)


def count_bytes(name: str, reduced: str, folder: Path) -> dict[str, int]:
    """What tools/bench/sent_bytes.py counts under engine `name`."""
    result = folder / f"sent-{name}-{reduced}.json"
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    script = Path(__file__).with_name("sent_bytes.py")
    settings = [ENGINES[name], f"precision.reduce={reduced}"]
    run([*torchrun, str(script), str(result), *settings], folder / "sent.log", {"OMP_NUM_THREADS": "1"})
    counted: dict[str, int] = json.loads(result.read_text())
    return counted


def print_bytes(sent: dict[str, dict[str, dict[str, int]]]) -> None:
    """Bytes per parameter and update of each kind of collective."""
    table = Table(
        title=f"Bytes per parameter that a rank sends in an update of two forwards, {PROCESSES} processes",
        box=None, header_style="bold", title_justify="left",
    )  # fmt: skip
    for heading in ("engine", "reduce"):
        table.add_column(heading)
    for heading in ("gradients", "parameters", "in all"):
        table.add_column(heading, justify="right")
    for name, settings in sent.items():
        for reduced, counted in settings.items():
            kinds = (counted["gradients"], counted["parameters"], counted["gradients"] + counted["parameters"])
            table.add_row(name, reduced, *(f"{size / counted['count']:.2f}" for size in kinds))
    console.print(table)


def print_curves(curves: dict[tuple[str, int], Curve], found: dict[str, dict[str, float]], *, title: str) -> None:
    """The end of each curve, and the mean differences."""
    table = Table(title=f"\n{title}", box=None, header_style="bold", title_justify="left")
    for heading in ("reduce", "seed"):
        table.add_column(heading)
    for heading in ("first loss", f"loss of the last {LAST}", "validation loss"):
        table.add_column(heading, justify="right")
    for (reduced, seed), curve in curves.items():
        figures = (curve.losses[0], curve.end, curve.validation["loss"])
        table.add_row(reduced, str(seed), *(f"{figure:.4f}" for figure in figures))
    console.print(table)
    differences = Table(title="Mean relative difference", box=None, header_style="bold", title_justify="left")
    differences.add_column("between")
    for heading in ("each update", f"the last {LAST}", "validation loss"):
        differences.add_column(heading, justify="right")
    for kind, means in found.items():
        differences.add_row(kind.partition("_")[2], *(f"{mean:.2%}" for mean in means.values()))
    console.print(differences)


if __name__ == "__main__":
    run_script(main)
