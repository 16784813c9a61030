"""One training step of this project and of Transformers, in turn: same weights, same audio, same masks and negatives.

    python tools/bench/step.py                                     `base`, 4 utterances of 10 s, fp32
    python tools/bench/step.py --compute bf16 --seconds 5 --seconds 15
    python tools/bench/step.py --lengths                           a real length distribution, where padding counts

A step is forward, backward, clipping and AdamW, with dropout, masking, the quantizer and 100 negatives on. All audio is
noise. Each has a process of its own, as it has in use, and waits while the other is at work. Who goes first alternates;
medians are reported. MFU is the share of the matrix-product rate that the same
machine reaches in the same run. The losses are reported, too: they differ by the
quantizer's noise, dropout, and the feature penalty, which Transformers does not have.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from w2vscale.config import Config, load_config
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.engine import build_engine
from w2vscale.engine.criterion import PretrainingCriterion
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import huggingface_config, to_huggingface
from w2vscale.interop.torchaudio import import_torchaudio
from w2vscale.models.inputs import PretrainingInputs, to_device
from w2vscale.training.run import empty_model, initial_values

LR = 1e-5
WARM_UP = 2
"""Steps that are not counted."""

Step = Callable[[MicroBatch], float]
"""Trains on one micro-batch; its loss per masked frame."""

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)


def main(
    preset: Annotated[str, typer.Option(help="Whose model.")] = "base",
    compute: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="precision.compute, and Transformers' autocast.")
    ] = "fp32",
    utterances: Annotated[int, typer.Option(min=1, help="Of a step.")] = 4,
    seconds: Annotated[list[float] | None, typer.Option(help="Of an utterance; repeatable.", show_default="10")] = None,
    lengths: Annotated[
        bool, typer.Option("--lengths", help="Utterances of lengths like LibriSpeech's, none longer than --seconds.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 7,
    alone: Annotated[bool, typer.Option("--alone", help="Without Transformers.")] = False,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
) -> None:
    """Time training steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(preset, [f"precision.compute={compute}", "model.layerdrop=0", *(settings or [])])
    peak = matrix_rate(compute, device)
    console.print(f"matrix products: {peak / 1e9:,.0f} GFLOP/s in {compute} on {device}")
    rows = []
    for length in seconds or [10.0]:
        work = Work(config, utterances, length, lengths)
        rows.append(measure(work, peak=peak, rounds=rounds, alone=alone) | {"seconds": length})
    print_table(rows, title=f"{preset}, {compute}, {utterances} utterances")
    document = {"preset": preset, "compute": compute, "utterances": utterances, "device": str(device)}
    print(json.dumps({**document, "matrix_flops": peak, "rows": rows, "ratio": rows[0].get("ratio")}))


@dataclass(frozen=True)
class Work:
    """A model, and the micro-batch that it is trained on."""

    config: Config
    utterances: int
    seconds: float
    lengths: bool

    def batch(self) -> MicroBatch:
        """The micro-batch, the same in every process."""
        return micro_batch(self.config, self.utterances, self.seconds, lengths=self.lengths)


@dataclass(frozen=True)
class Taken:
    """What a step took."""

    seconds: float
    loss: float
    memory: int
    """The most that was allocated on the GPU, in bytes; 0 without one."""


class Racer:
    """Steps in a process of its own."""

    def __init__(self, name: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_race, args=(theirs, name, work), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Taken:
        """Take a step, and wait for its end."""
        self.connection.send(True)
        taken: Taken = self.connection.recv()
        return taken

    def end(self) -> None:
        """Give its memory back."""
        self.process.kill()
        self.process.join()


def _race(connection: Connection, name: str, work: Work) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = {"w2vscale": our_step, "transformers": their_step}[name](work.config, device)
    batch = work.batch()
    while connection.recv():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step(batch)
        seconds = time.perf_counter() - began
        connection.send(Taken(seconds, loss, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0))


def measure(work: Work, *, peak: float, rounds: int, alone: bool) -> dict[str, Any]:
    """Times, rates and memory of steps on one micro-batch."""
    batch = work.batch()
    flops = step_flops(work.config, batch)
    racers = {name: Racer(name, work) for name in ("w2vscale", "transformers")[: 1 if alone else 2]}
    taken: dict[str, list[Taken]] = {name: [] for name in racers}
    for index in range(WARM_UP + rounds):
        for name in sorted(racers, reverse=bool(index % 2)):
            taken[name].append(racers[name].step())
    for racer in racers.values():
        racer.end()
    audio = batch.audio_samples / work.config.model.sampling_rate
    found: dict[str, Any] = {"audio_seconds": audio, "flops": flops}
    for name, steps in taken.items():
        times = [step.seconds for step in steps[WARM_UP:]]
        median = statistics.median(times)
        found[name] = {
            "step_seconds": median,
            "fastest": min(times),
            "audio_per_second": audio / median,
            "mfu": flops / median / peak,
            "memory": max(step.memory for step in steps),
            "losses": [step.loss for step in steps],
        }
    if not alone:
        pairs = zip(taken["transformers"][WARM_UP:], taken["w2vscale"][WARM_UP:], strict=True)
        found["ratio"] = statistics.median(theirs.seconds / ours.seconds for theirs, ours in pairs)
    return found


def our_step(config: Config, device: torch.device) -> Step:
    """As the training loop has the engine do it."""
    engine = build_engine(empty_model(config), PretrainingCriterion(config.model, seed=0), config, device)
    engine.import_parameters(initial_values(config))

    def step(batch: MicroBatch) -> float:
        sums = engine.run_window([batch], torch.tensor(float(batch.weight), device=device))
        engine.step(lr=LR, max_norm=config.optim.max_norm)
        return float(sums.total) / batch.weight

    return step


def their_step(config: Config, device: torch.device) -> Step:
    """Transformers' model, with our initial values, in the plainest loop."""
    with contextlib.suppress(UserError):  # not installed
        import_torchaudio()  # before Transformers imports it
    import transformers

    with torch.device("meta"):
        model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config.model)))
    model.load_state_dict(to_huggingface(dict(initial_values(config)), config.model), assign=True)
    torch.nn.Module.to(model, device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=config.optim.weight_decay, fused=True)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision.compute == "bf16")

    def step(batch: MicroBatch) -> float:
        inputs = to_device(batch.inputs, device)
        attend_BS = torch.arange(inputs.waveforms_BS.shape[1], device=device) < inputs.lengths_B.unsqueeze(1)
        with bf16:
            found = model(
                inputs.waveforms_BS,
                attention_mask=attend_BS.long() if inputs.padded else None,
                mask_time_indices=inputs.mask_BT,
                sampled_negative_indices=flat_negatives(inputs),
            )
        (found.loss / batch.weight).backward()
        nn.utils.clip_grad_norm_(parameters, config.optim.max_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return float(found.loss.detach()) / batch.weight

    return step


def flat_negatives(inputs: PretrainingInputs) -> Tensor:
    """Our negatives (numbers among an utterance's masked frames) as Transformers' (frames of the flattened batch)."""
    batch, frames = inputs.mask_BT.shape
    negatives = inputs.negatives_MK
    flat_BTK = torch.zeros(batch, frames, negatives.shape[1], dtype=torch.long, device=negatives.device)
    for row, mask_T in enumerate(inputs.mask_BT):
        frame_N = mask_T.nonzero().squeeze(1)
        flat_BTK[row, frame_N] = row * frames + frame_N[negatives[inputs.utterance_M == row].long()]
    return flat_BTK


def micro_batch(config: Config, utterances: int, seconds: float, *, lengths: bool) -> MicroBatch:
    """Utterances of noise, all of `seconds`, or spread like LibriSpeech's below it: most near 14 s of 16."""
    draws = np.random.default_rng(0)
    longest = int(seconds * config.model.sampling_rate)
    shares = 1.0 - draws.beta(1.0, 3.5, size=utterances) if lengths else np.ones(utterances)
    shares[0] = 1.0
    waveforms = [draws.standard_normal(int(share * longest), dtype=np.float32) for share in shares]
    inputs = make_inputs(waveforms, range(utterances), number=0, seed=0, config=config.model)
    return MicroBatch(update=0, number=0, inputs=inputs, audio_samples=sum(map(len, waveforms)))


def step_flops(config: Config, batch: MicroBatch) -> int:
    """Floating-point operations of forward and backward, as PyTorch counts them, without memory or time."""
    document = config.model_dump(mode="json") | {"precision": {"compute": "fp32"}}
    plain = Config.model_validate(document)
    model = empty_model(plain).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, (_, value) in zip(model.parameters(), initial_values(plain), strict=True):
            parameter.copy_(value)
    criterion = PretrainingCriterion(plain.model, seed=0)
    with FlopCounterMode(display=False) as counter:
        criterion(model, [batch], device=torch.device("cpu"), training=True).total.backward()
    del model
    gc.collect()
    return int(counter.get_total_flops())


def matrix_rate(compute: str, device: torch.device) -> float:
    """The best rate of a large matrix product here, FLOP/s."""
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def print_table(rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Seconds, rates and ratios."""
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    for heading in ("seconds", "model", "step, s", "audio, s/s", "MFU", "times Transformers", "peak memory, GiB"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        for name in ("w2vscale", "transformers"):
            if name not in row:
                continue
            one = row[name]
            table.add_row(
                f"{row['seconds']:g}",
                name,
                f"{one['step_seconds']:.3f}",
                f"{one['audio_per_second']:.1f}",
                f"{one['mfu']:.1%}",
                f"{row['ratio']:.2f}" if name == "w2vscale" and "ratio" in row else "",
                f"{one['memory'] / 2**30:.2f}" if one["memory"] else "",
            )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
