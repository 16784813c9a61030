"""One training step of this project and of others, in turn: same weights, same audio, same masks and negatives.

    python tools/bench/step.py                                     `base`, 4 utterances of 10 s, in fp32 and bf16
    python tools/bench/step.py --compute fp32 --seconds 5 --seconds 15 --utterances 1 --utterances 8
    python tools/bench/step.py --lengths                           a real length distribution, where padding counts
    python tools/bench/step.py --with w2vscale --with w2vscale-compiled --preset large

A step is forward, backward, clipping and AdamW, with dropout, masking, the quantizer and 100 negatives on. All audio is
noise. Each contender has a process of its own, as it has in use, and waits while another is at work. Who goes first
alternates; medians are reported, of the ratio that of pairs. MFU is the share that the model's products have of the
best rate of matrix products that the same machine reached between the steps; on a GPU there is their share of 800
TFLOP/s, too. The losses are reported, too: they differ by the quantizer's noise, dropout, and the feature penalty,
which Transformers does not have. torchaudio has an encoder alone: its step has no masks and no contrastive loss.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tools.bench.contenders import (
    Step,
    Work,
    matrix_rate,
    our_step,
    synchronize,
    their_step,
    torchaudio_step,
    work_settings,
)
from tools.bench.engine_memory import resident
from tools.bench.loss_head import loss_head_memory
from tools.bench.script import console, one_line_errors, run_script
from w2vscale import runtime
from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.errors import UserError
from w2vscale.kernels.precision import CPU_HAS_BF16

WARM_UP = 2
"""Steps that are not counted, unless there are no others."""

CONTENDERS: dict[str, Callable[[Config, torch.device], Step]] = {
    "w2vscale": our_step,
    "w2vscale-compiled": partial(our_step, compiled=True),
    "transformers": their_step,
    "transformers-compiled": partial(their_step, compiled=True),
    "torchaudio": torchaudio_step,
}


def main(
    preset: Annotated[list[str] | None, typer.Option(help="Whose model; repeatable.", show_default="base")] = None,
    compute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="fp32|bf16",
            help="precision.compute, others' autocast; repeatable.",
            show_default="what is fast",
        ),
    ] = None,
    utterances: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a step; repeatable.", show_default="4")
    ] = None,
    seconds: Annotated[
        list[float] | None, typer.Option(min=0.5, help="Of an utterance; repeatable.", show_default="10")
    ] = None,
    lengths: Annotated[
        bool, typer.Option("--lengths", help="Utterances of lengths like LibriSpeech's, none longer than --seconds.")
    ] = False,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="|".join(CONTENDERS),
            help="Who takes part; repeatable.",
            show_default="w2vscale and transformers; on a GPU compiled, too",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 5,
    limit: Annotated[
        float,
        typer.Option(min=1, help="Seconds of a row, after which no round begins, and of a step, after which it ends."),
    ] = 240.0,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
) -> None:
    """Time training steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = list(dict.fromkeys(contenders or ["w2vscale", "transformers"]))
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise typer.BadParameter(f"{unknown[0]}: none of {', '.join(CONTENDERS)}", param_hint="--with")
    if contenders is None and device.type == "cuda":
        names += [f"{name}-compiled" for name in names]
    rows: list[dict[str, Any]] = []
    work: Work | None = None
    for model, computing, count, length in product(
        preset or ["base"], compute or default_precisions(device), utterances or [4], seconds or [10.0]
    ):
        config = work_settings(model, [*(settings or []), f"precision.compute={computing}"])
        row: dict[str, Any] = {"preset": model, "compute": computing, "utterances": count, "seconds": length}
        work = Work(config, count, length, "corpus" if lengths else "equal")
        row |= measure(work, names, device=device, rounds=rounds, limit=limit)
        print_table(row)
        rows.append(row)
    assert work is not None
    head = None
    try:
        head = loss_head_memory(work)
        console.print(f"loss head: {head['ratio']:.3f} of Transformers' memory")
    except UserError as error:
        console.print(f"loss head: {error}")
    document = summary(rows, device) | {"loss_head_memory_ratio": head and head["ratio"], "loss_head": head}
    print(json.dumps({**document, "device": str(device), "rows": rows}))


def default_precisions(device: torch.device) -> list[str]:
    """fp32, and bf16 where the device has instructions for it: without them a step takes minutes."""
    return ["fp32", "bf16"] if device.type == "cuda" or CPU_HAS_BF16 else ["fp32"]


def summary(rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The figures of the first row in each precision."""
    found: dict[str, Any] = {}
    for row in rows:
        ours = best(row, "w2vscale")
        if ours is not None and row["compute"] not in found:
            figures = {"ratio": row["ratio"], "mfu": ours["mfu"], "audio_seconds_per_second": ours["audio_per_second"]}
            found[row["compute"]] = figures
    first = found.get("bf16" if device.type == "cuda" else "fp32", {})
    return found | {"audio_seconds_per_second": first.get("audio_seconds_per_second")}


@dataclass(frozen=True)
class Taken:
    """What a step took."""

    seconds: float
    loss: float
    memory: int
    """The most that was allocated on the GPU; without one, the most memory that the process has had. Bytes."""


class Racer:
    """Steps in a process of its own."""

    def __init__(self, name: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_race, args=(theirs, name, work), daemon=True)
        self.process.start()
        theirs.close()

    def step(self, limit: float) -> Taken | None:
        """Take a step, and wait for its end; None if it takes longer than `limit` seconds, and is the last then.

        Raises:
            EOFError, OSError: the process has ended; it said why.
        """
        self.connection.send(True)
        if not self.connection.poll(limit):
            self.end()
            return None
        taken: Taken = self.connection.recv()
        return taken

    def end(self) -> None:
        """Give its memory back."""
        self.process.kill()
        self.process.join()


def _race(connection: Connection, name: str, work: Work) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime.end_with_parent()
    torch.manual_seed(work.config.trainer.seed)  # Transformers draws its quantizer's noise from torch's generator
    with one_line_errors(), suppress(EOFError, OSError):  # the bench has ended
        step = CONTENDERS[name](work.config, device)
        batch = work.batch()
        while connection.recv():
            connection.send(_take(step, batch, device))


def _take(step: Step, batch: MicroBatch, device: torch.device) -> Taken:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    began = time.perf_counter()
    loss = step(batch)
    synchronize(device)
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        return Taken(seconds, loss, torch.cuda.max_memory_allocated())
    return Taken(seconds, loss, resident("VmHWM"))


def measure(work: Work, names: Sequence[str], *, device: torch.device, rounds: int, limit: float) -> dict[str, Any]:
    """Times, rates and memory of steps on one micro-batch."""
    # A GPU keeps its rate, and the contenders soon hold its memory.
    peak = matrix_rate(work.config.precision.compute, device) if device.type == "cuda" else 0.0
    began = time.perf_counter()
    racers = {name: Racer(name, work) for name in names}
    audio = work.batch().audio_samples / work.config.model.sampling_rate
    flops = work.flops()
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    too_slow: set[str] = set()
    failed: set[str] = set()
    computing = work.config.precision.compute
    for index in range(WARM_UP + rounds):
        if index and time.perf_counter() - began > limit:
            break
        for name in names if index % 2 else reversed(names):
            if name in too_slow or name in failed:
                continue
            try:
                step = racers[name].step(limit)
            except (EOFError, OSError):
                failed.add(name)
                console.print(f"{name}: its process has ended, see above")
                continue
            if step is None:
                too_slow.add(name)
                began = time.perf_counter()
            else:
                taken[name].append(step)
        if device.type != "cuda":
            peak = max(peak, matrix_rate(computing, device))
    for racer in racers.values():
        racer.end()
    found: dict[str, Any] = {
        "audio_seconds": audio, "flops": flops, "matrix_flops": peak, "steps": {}
    }  # fmt: skip
    for name, steps in taken.items():
        if name in failed:
            found["steps"][name] = None
            continue
        if name in too_slow:
            unknown = dict.fromkeys(("audio_per_second", "mfu", "memory"))
            found["steps"][name] = {"times": [limit], "median": limit, "longer": True, **unknown}
            continue
        times = [step.seconds for step in steps[WARM_UP:] or steps[-1:]]  # where the limit ended the warm-up
        median = statistics.median(times)
        found["steps"][name] = {
            "times": times,
            "median": median,
            "longer": False,
            "audio_per_second": audio / median,
            # torchaudio's encoder has less to compute.
            "mfu": None if name == "torchaudio" else flops / median / peak,
            "of_800_tflops": flops / median / 8e14 if device.type == "cuda" and name != "torchaudio" else None,
            "memory": max(step.memory for step in steps),
            "losses": [step.loss for step in steps],
        }
    ours, theirs = best(found, "w2vscale"), best(found, "transformers")
    found |= {"ratio": None, "ratio_is_a_bound": False}
    if ours is not None and theirs is not None and not ours["longer"]:
        theirs_in_turn = theirs["times"] * (len(ours["times"]) if theirs["longer"] else 1)
        found["ratio"] = statistics.median(b / a for a, b in zip(ours["times"], theirs_in_turn, strict=True))
        found["ratio_is_a_bound"] = theirs["longer"]
    return found


def best(row: dict[str, Any], project: str) -> dict[str, Any] | None:
    """The figures of a project's faster variant."""
    found = [figures for name, figures in row["steps"].items() if figures and name.startswith(project)]
    return min(found, key=lambda figures: figures["median"], default=None)


def print_table(row: dict[str, Any]) -> None:
    """Seconds, rates, memory."""
    ratio = ""
    if row["ratio"] is not None:
        at_least = "at least " * row["ratio_is_a_bound"]
        ratio = f", w2vscale {at_least}{row['ratio']:.2f} times as fast as Transformers"
    table = Table(
        title=f"{row['preset']}, {row['compute']}, {row['utterances']} utterances of {row['seconds']:g} s; matrix "
        f"products {row['matrix_flops'] / 1e9:,.0f} GFLOP/s{ratio}",
        box=None,
        header_style="bold",
        title_justify="left",
    )
    for heading in ("", "step, s: median", "fastest", "audio, s/s", "MFU", "peak memory, GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in row["steps"].items():
        if one is None:
            table.add_row(name, "failed")
            continue
        if one["longer"]:
            table.add_row(name, f"> {one['median']:g}")
            continue
        table.add_row(
            name,
            f"{one['median']:.3f}",
            f"{min(one['times']):.3f}",
            f"{one['audio_per_second']:.1f}",
            "" if one["mfu"] is None else f"{one['mfu']:.1%}",
            f"{one['memory'] / 2**30:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    run_script(main)
