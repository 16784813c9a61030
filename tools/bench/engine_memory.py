"""Memory of one engine: what each rank holds and its peak, beside what `w2vscale plan` predicts.

    torchrun --standalone --nproc-per-node 2 tools/bench/engine_memory.py RESULT.json --preset base engine.name=fsdp

Two updates of two micro-batches per rank: from the second on, gradients accumulate, and ZeRO-3 knows what to gather
ahead. The peak is of what PyTorch allocates for the engine and while it works. Resident memory is counted from what it
was right before the model of the engine was built, after a forward and backward of a plain one that came and went.
Part of plan_memory.py and engine_parity.py.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from tools.bench.allocations import Allocations, living_tensors, storages
from tools.bench.running import build, filled_model
from tools.bench.script import run_script
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group
from w2vscale.engine.deepspeed.config import import_deepspeed
from w2vscale.objectives import StepContext, build_objective
from w2vscale.optim.ema import AVERAGE
from w2vscale.planning.fake_pass import noise
from w2vscale.planning.memory import demand
from w2vscale.planning.state import state_of
from w2vscale.planning.traffic import sharding_by
from w2vscale.planning.work import model_of

UPDATES, MICRO_BATCHES = 2, 2


@dataclass(frozen=True)
class Figures:
    """Bytes of the rank that needs most."""

    parameters: int  # number of parameters
    peak: int  # allocated
    predicted: float
    predicted_parts: dict[str, float]  # at the predicted peak
    peaks: dict[str, int]  # allocated, by phase
    held: dict[str, int]  # between the last backward and the step, by kind
    predicted_held: dict[str, float]
    resident: int  # between the last backward and the step
    resident_peak: int


def main(
    result: Path,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
    preset: Annotated[str, typer.Option(help="Preset of the model.")] = "base",
    utterances: Annotated[int, typer.Option(min=1, help="Utterances of a micro-batch.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.5, help="Seconds of audio of an utterance.")] = 2.5,
) -> None:
    """Measure; rank 0 writes RESULT."""
    with process_group(needed=True) as (ranks, device):
        torch.set_num_threads(1)
        config = measured_run(preset, settings or [], ranks=ranks.world_size, utterances=utterances, seconds=seconds)
        if config.engine.name == "deepspeed":
            import_deepspeed(device)
        figures = measured(config, device)
        every: list[Figures] = [figures] * ranks.world_size
        dist.all_gather_object(every, figures)
        if ranks.is_main:
            result.write_text(json.dumps(asdict(max(every, key=lambda one: one.peak))))


def measured_run(preset: str, settings: Sequence[str], *, ranks: int, utterances: int, seconds: float) -> Config:
    """The settings of a run whose micro-batches have some utterances of `seconds`."""
    fixed = [f"data.max_seconds={seconds}", f"data.min_seconds={min(seconds, 0.5)}"]
    fixed += [f"batch.max_seconds={utterances * seconds}", f"batch.micro_batches={MICRO_BATCHES * ranks}"]
    return load_config(preset, [*fixed, "regularization.layerdrop=0", *settings])


def measured(config: Config, device: torch.device) -> Figures:
    """Train for two updates, and predict. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = [micro_batch(config, number=MICRO_BATCHES * rank + place) for place in range(MICRO_BATCHES)]
    plain_pass(config, batches[0], device)
    gc.collect()
    before = memory(device)
    reset_peak(device)
    with Allocations(device) as allocations:
        with allocations.phase("build"):
            setup = build(config, device)
        for update in range(UPDATES):
            # DDP has buckets that Python does not know until the first gradients are in them.
            known = update > 0 or config.engine.name != "ddp"
            with allocations.phase(f"backward {update + 1}", all_known=known):
                weight = sum(batch.weight for batch in batches)
                setup.window(batches, float(weight * world_size), update=update)
            resident, kinds = memory(device) - before, held(setup.engine)
            with allocations.phase(f"step {update + 1}", all_known=True):
                setup.step(1e-4)
        resident_peak = peak_memory(device) - before
    setup.engine.close()
    model = model_of("", config, device="cuda" if device.type == "cuda" else "cpu")
    sharding = sharding_by(config, world_size)
    footprint = demand(model, sharding, forwards=MICRO_BATCHES).footprint(model.utterances)
    return Figures(
        parameters=model.parameters,
        peak=max(allocations.peaks.values()),
        predicted=footprint.total,
        predicted_parts=footprint._asdict(),
        peaks=allocations.peaks,
        held=kinds,
        predicted_held=state_of(model, sharding)._asdict(),
        resident=resident,
        resident_peak=resident_peak,
    )


def micro_batch(config: Config, *, number: int) -> MicroBatch:
    """As many utterances of noise as a micro-batch has room for."""
    utterances, seconds = int(config.batch.max_seconds / config.data.max_seconds), config.data.max_seconds
    inputs = noise(build_objective(config), utterances=utterances, seconds=seconds)
    return MicroBatch(number, inputs, sum(inputs.audio.samples))


def plain_pass(config: Config, batch: MicroBatch, device: torch.device) -> None:
    """Run a forward and backward of a plain model, so that PyTorch loads what it loads at first use."""
    objective, model = build_objective(config), filled_model(config).to(device)
    inputs = to_device(batch.inputs, device)
    objective.forward(model, inputs, step=StepContext(0, 0, (batch.number,)), training=True).total.backward()


def held(engine: Any) -> dict[str, int]:
    """Bytes that this rank holds, by kind; `other` is every live tensor that is none of these: DeepSpeed's buckets."""
    gradients: list[Tensor | None] = []
    if hasattr(engine, "zero"):
        zero, optimizer, masters = engine.zero, engine.zero.optimizer, list(engine._partitions())
        shares = [getattr(parameter, "ds_tensor", parameter.data) for parameter in engine.parameters.values()]
        # With ZeRO-3, those that stay gathered are there too.
        parameters = [*shares, *(parameter.data for parameter in engine.parameters.values())]
        gradients += [parameter.grad for parameter in engine.parameters.values()]
        gradients += [getattr(zero, "grad_partitions_flat_buffer", None), getattr(zero, "grads_in_partition", None)]
        gradients += getattr(zero, "fp32_groups_gradients_flat", [])
        for group in [
            *getattr(zero, "all_grad_tensors", {}).values(),
            *getattr(zero, "averaged_gradients", {}).values(),
        ]:
            gradients += group or []
    else:
        optimizer, masters = engine.optimizer, []
        parameters = [parameter.data for parameter in engine.model.parameters()]
        gradients += [parameter.grad for parameter in engine.model.parameters()]
    everything = storages(living_tensors())
    states = list(optimizer.state.values())
    kinds = {
        "parameters": storages(parameters),
        "masters": storages(masters),
        "moments": storages(value for state in states for key, value in state.items() if key != AVERAGE),
        "average": storages(state[AVERAGE] for state in states if AVERAGE in state),
        "gradients": storages(gradients),
    }
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for kind, found in {**kinds, "other": everything}.items():
        sizes[kind] = sum(size for address, size in found.items() if address not in seen)
        seen |= found.keys()
    return sizes


def resident(key: str) -> int:
    """VmRSS, or VmHWM: the highest VmRSS since it was last reset; of this process, in bytes (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def memory(device: torch.device) -> int:
    """Bytes of this process: resident on a CPU, allocated on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most that `memory` was since the last `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` start again from what is there now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    run_script(main)
