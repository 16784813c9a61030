"""The plan against Lhotse's DynamicBucketingSampler on the same durations, and the forwards that it gives.

    python tools/bench/sampler.py --utterances 1000000

Durations are drawn as LibriSpeech's are distributed. Both form the micro-batches of a whole epoch, of at most 87.5
padded seconds of utterances cropped to 15.625 s (BASE), with 64 buckets at most. Each side runs in a process of its
own, and they alternate. Planning is all that an epoch needs to be decided; Lhotse decides while it iterates, so that
the time of taking each micro-batch from the plan, one by one, is given too (of 100,000, for the whole epoch in
proportion). Restoring is opening the corpus and reaching micro-batch 0.9 of the epoch; Lhotse replays what came before.
With `--no-lhotse`, which is for tens of millions, the corpus is a manifest on disk that is indexed first.

The second table has the forwards of `base` and `large` on several numbers of ranks: micro-batches of one series share a
forward, as with the default settings and enough memory. Beside it are two forms without series (`batch.same_bucket=1`):
forwards of one micro-batch, and forwards of as many micro-batches as with series.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from tools.bench.script import console
from w2vscale.data.plan import Plan, largest_divisor, rank_window, run_length

ROOT = Path(__file__).resolve().parents[2]
RATE = 16_000
BUDGET, LONGEST, SHORTEST = 87.5, 15.625, 2.0
BUCKETS = 64

PRESETS = ("base", "large")
RANKS = (1, 8, 32)
UPDATES = 400  # whose forwards are measured, each on one rank
SERIES, ALONE, JOINED = "forwards", "forwards_alone", "forwards_joined"
FORMS = {SERIES: "series", ALONE: "no series, alone", JOINED: "no series, joined"}

Forwards = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Figures by form, preset and number of ranks."""

app = typer.Typer(add_completion=False)


def durations(utterances: int) -> NDArray[np.float64]:
    """Seconds. Three in four are of 12 to 17 seconds, the rest is spread below, as in LibriSpeech's training parts."""
    random = np.random.default_rng(0)
    near_the_limit = random.normal(14.6, 1.3, utterances)
    spread = random.uniform(1.5, 15.0, utterances)
    drawn = np.where(random.random(utterances) < 0.75, near_the_limit, spread)
    return np.round(np.clip(drawn, 1.3, 24.5), 4)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    utterances: Annotated[int, typer.Option(min=1000, help="Size of the corpus.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side runs; figures are medians.")] = 3,
    lhotse: Annotated[bool, typer.Option(help="Also Lhotse's sampler, which takes minutes per million.")] = True,
    folder: Annotated[Path, typer.Option(file_okay=False, help="For the corpus of a run without Lhotse.")] = ROOT
    / "exp"
    / "bench"
    / "sampler",
) -> None:
    """Compare, print a table, and JSON as the last line."""
    if context.invoked_subcommand:
        return
    source = str(write_corpus(folder, utterances)) if not lhotse else "-"
    sides: dict[str, list[dict[str, float]]] = {"plan": [], "lhotse": []} if lhotse else {"plan": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(run_side(side, utterances, source))
    figures = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]} for side, found in sides.items()
    }
    print_figures(figures, utterances)
    forwards = measure_forwards(durations(utterances))
    print_forwards(forwards)
    ours = figures["plan"]
    result = {
        "utterances": utterances,
        "padding": ours["padding"],
        "partly_filled": ours["partly_filled"],
        "plan_seconds": ours["seconds"],
        "walk_seconds": ours["walk_seconds"],
        "restore_seconds": ours["restore_seconds"],
        "memory_mb": ours["memory_mb"],
        **forwards,
    }
    if lhotse:
        theirs = figures["lhotse"]
        result |= {
            "padding_lhotse": theirs["padding"],
            "plan_seconds_lhotse": theirs["seconds"],
            "restore_seconds_lhotse": theirs["restore_seconds"],
            "memory_mb_lhotse": theirs["memory_mb"],
            "ratio": ratio(sides, "seconds"),
            "ratio_walked": ratio(sides, "walk_seconds"),
        }
    print(json.dumps(result))


def ratio(sides: dict[str, list[dict[str, float]]], key: str) -> float:
    """How many times longer Lhotse takes; the median of the rounds."""
    return statistics.median(
        theirs[key] / ours[key] for theirs, ours in zip(sides["lhotse"], sides["plan"], strict=True)
    )


@app.command(hidden=True)
def side(name: str, utterances: int, source: str) -> None:
    """One side's measurement, in a process that does nothing else."""
    print(json.dumps(measure_plan(utterances, source) if name == "plan" else measure_lhotse(utterances)))


def run_side(name: str, utterances: int, source: str) -> dict[str, float]:
    """Start a process for one side, and read what it prints."""
    print(f"measuring {name}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "side", name, str(utterances), source]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{finished.stderr[-3000:]}\nfailed: {name}")
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def measure_plan(utterances: int, source: str) -> dict[str, float]:
    """Plan an epoch to its last micro-batch; then open and reach 0.9 of one as a resumed run does."""
    from w2vscale.data.manifest import Manifest

    given = durations(utterances) if source == "-" else None
    before = start_counting_memory()

    def open_plan() -> Plan:
        seconds = given if given is not None else Manifest(Path(source)).durations
        return make_plan(seconds, longest=LONGEST, shortest=SHORTEST, budget=BUDGET, buckets=BUCKETS)

    began = time.perf_counter()
    plan = open_plan()
    plan.micro_batch(plan.per_epoch * 9 // 10)
    restored = time.perf_counter() - began

    began = time.perf_counter()
    plan = open_plan()
    # All that an epoch needs to be drawn: then each micro-batch is a look-up.
    padding = plan.padding()
    elapsed = time.perf_counter() - began

    began = time.perf_counter()
    taken = min(plan.per_epoch, 100_000)
    for number in range(taken):
        plan.micro_batch(number)
    walked = time.perf_counter() - began
    partly = sum(bool(bucket.count % bucket.per_micro_batch) for bucket in plan.buckets)
    return {
        "padding": padding,
        "budget_filled": filled(plan.per_epoch, padding, float(plan.epoch_draws()[1].sum()) / RATE),
        "micro_batches": plan.per_epoch,
        "partly_filled": partly / plan.per_epoch,
        "seconds": elapsed,
        "walk_seconds": elapsed + walked * plan.per_epoch / taken,
        "restore_seconds": restored,
        "memory_mb": peak_memory() - before,
    }


def make_plan(
    seconds: NDArray[np.float64],
    *,
    longest: float,
    shortest: float,
    budget: float,
    buckets: int,
    series_length: int = 1,
) -> Plan:
    """The plan of a corpus with these durations; all lengths are in seconds."""
    return Plan(
        np.rint(seconds * RATE).astype(np.int64),
        max_samples=int(longest * RATE),
        min_samples=int(shortest * RATE),
        budget_samples=int(budget * RATE),
        buckets=buckets,
        seed=0,
        series_length=series_length,
    )


def measure_forwards(seconds: NDArray[np.float64]) -> Forwards:
    """Measure the forwards of the presets with their settings."""
    from w2vscale.config import load_config

    found: Forwards = {form: {preset: {} for preset in PRESETS} for form in FORMS}
    for preset in PRESETS:
        data, batch = load_config(preset).data, load_config(preset).batch
        series, single = (
            make_plan(
                seconds, longest=data.max_seconds, shortest=data.min_seconds, budget=batch.max_seconds,
                buckets=batch.buckets, series_length=length,
            )
            for length in (largest_divisor(batch.micro_batches, at_most=batch.same_bucket), 1)
        )  # fmt: skip
        for ranks in RANKS:
            run = run_length(series.series_length, per_rank=batch.micro_batches // ranks)
            for form, plan, per_forward in ((SERIES, series, run), (ALONE, single, 1), (JOINED, single, run)):
                found[form][preset][str(ranks)] = forwards_of(plan, batch.micro_batches, ranks, per_forward)
    return found


def forwards_of(plan: Plan, micro_batches: int, ranks: int, per_forward: int) -> dict[str, float]:
    """Padding and seconds of audio of the forwards of `UPDATES` updates, each on another rank."""
    padded, samples = 0, []
    for update in range(UPDATES):
        window = rank_window(plan, update, micro_batches=micro_batches, rank=update % ranks, world_size=ranks)
        for start in range(0, len(window), per_forward):
            lengths = np.concatenate([plan.lengths(number) for number in window[start : start + per_forward]])
            padded += lengths.size * int(lengths.max())
            samples.append(int(lengths.sum()))
    return {
        "micro_batches": per_forward,
        "padding": 1 - sum(samples) / padded,
        "seconds_mean": statistics.mean(samples) / RATE,
        "seconds_p10": float(np.percentile(samples, 10)) / RATE,
        "seconds_shortest": min(samples) / RATE,
    }


def measure_lhotse(utterances: int) -> dict[str, float]:
    """Iterate over an epoch; and again up to 0.9 of it, as its `load_state_dict` does."""
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    seconds = durations(utterances)
    before = start_counting_memory()

    class Cuts:
        """Made one by one, as from a JSONL file that is read lazily, but without reading one."""

        def __iter__(self) -> Any:
            for number, duration in enumerate(seconds):
                if duration >= SHORTEST:
                    yield MonoCut(str(number), 0.0, min(float(duration), LONGEST), 0)

    def sampler() -> DynamicBucketingSampler:
        return DynamicBucketingSampler(
            CutSet(Cuts()), max_duration=BUDGET, num_buckets=BUCKETS, shuffle=True, seed=0, rank=0, world_size=1
        )

    began = time.perf_counter()
    audio = padded = 0.0
    batches = 0
    for cuts in sampler():
        lengths = [cut.duration for cut in cuts]
        audio += sum(lengths)
        padded += max(lengths) * len(lengths)
        batches += 1
    elapsed = time.perf_counter() - began

    began = time.perf_counter()
    for done, _ in enumerate(sampler(), start=1):
        if done == batches * 9 // 10:
            break
    return {
        "padding": 1 - audio / padded,
        "budget_filled": padded / (batches * BUDGET),
        "micro_batches": batches,
        "partly_filled": 0.0,
        "seconds": elapsed,
        "walk_seconds": elapsed,
        "restore_seconds": time.perf_counter() - began,
        "memory_mb": peak_memory() - before,
    }


def filled(micro_batches: int, padding: float, seconds: float) -> float:
    """Padded audio as a share of what the budget allows."""
    return seconds / (1 - padding) / (micro_batches * BUDGET)


def write_corpus(folder: Path, utterances: int) -> Path:
    """A manifest with lines like those of LibriSpeech's, and its index; kept for the next run."""
    manifest = folder / f"cuts_{utterances}.jsonl"
    if not manifest.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with manifest.open("w") as lines:
            for number, seconds in enumerate(durations(utterances)):
                lines.write(LINE.format(id=f"{number:08d}", seconds=seconds, samples=round(seconds * RATE)))
        took, size = time.perf_counter() - began, manifest.stat().st_size / 2**30
        print(f"wrote {manifest}, {size:.2f} GiB, in {took:.0f} s", file=sys.stderr)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "w2vscale", "data", "index", str(manifest), "-j", "2"], check=True)
    print(f"indexed in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return manifest


LINE = (
    '{{"id": "{id}", "start": 0, "duration": {seconds}, "channel": 0, "supervisions": [{{"id": "{id}", '
    '"recording_id": "{id}", "start": 0.0, "duration": {seconds}, "channel": 0, "text": "A SENTENCE OF SOME WORDS", '
    '"language": "English", "speaker": "1"}}], "recording": {{"id": "{id}", "sources": [{{"type": "file", '
    '"channels": [0], "source": "/corpus/{id}.flac"}}], "sampling_rate": 16000, "num_samples": {samples}, '
    '"duration": {seconds}, "channel_ids": [0]}}, "type": "MonoCut"}}\n'
)


def start_counting_memory() -> float:
    """MB of this process now; its peak starts anew from here (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> float:
    """MB of this process, at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def print_figures(figures: dict[str, dict[str, float]], utterances: int) -> None:
    """One row for each side."""
    table = Table(title=f"{utterances:,} utterances, one epoch", box=None, header_style="bold", title_justify="left")
    table.add_column("")
    for heading in (
        "micro-batches", "padding", "budget filled", "partly filled", "planning, s", "and each taken, s",
        "restoring at 0.9, s", "memory, MB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, of in figures.items():
        table.add_row(
            name,
            f"{of['micro_batches']:,.0f}",
            f"{of['padding']:.2%}",
            f"{of['budget_filled']:.1%}",
            f"{of['partly_filled']:.2%}",
            f"{of['seconds']:.2f}",
            f"{of['walk_seconds']:.1f}",
            f"{of['restore_seconds']:.2f}",
            f"{of['memory_mb']:.0f}",
        )
    console.print(table)


def print_forwards(forwards: Forwards) -> None:
    """One row for each preset, number of ranks and form."""
    table = Table(title="Forwards", box=None, header_style="bold", title_justify="left")
    for heading in ("preset", "ranks", "form"):
        table.add_column(heading)
    for heading in ("micro-batches", "padding", "audio: mean, s", "10th percentile, s", "shortest, s"):
        table.add_column(heading, justify="right")
    for preset in PRESETS:
        for ranks in map(str, RANKS):
            for form, name in FORMS.items():
                of = forwards[form][preset][ranks]
                seconds = (f"{of[f'seconds_{which}']:.0f}" for which in ("mean", "p10", "shortest"))
                table.add_row(preset, ranks, name, f"{of['micro_batches']:.0f}", f"{of['padding']:.2%}", *seconds)
    console.print(table)


if __name__ == "__main__":
    app()
