"""Memory of one engine: what each rank holds and its peak, beside what the theory says. Part of engine_parity.py.

    torchrun --standalone --nproc-per-node 2 tools/bench/engine_memory.py RESULT.json engine.name=fsdp

A model of BASE's size, in fp32, takes two updates of one micro-batch per rank. Memory is counted from what it was
right before the engine's model was built, after a forward and backward of a plain one that came and went: resident
memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers.batches import inputs_of
from tools.bench.running import build, filled_model
from tools.bench.script import run_script
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group
from w2vscale.engine.deepspeed.config import deepspeed_config, import_deepspeed
from w2vscale.objectives import StepContext, build_objective
from w2vscale.training.run import empty_model

UPDATES = 2
"""From the second on, DDP has its final buckets and ZeRO-3 knows what to gather ahead."""

SECONDS = 2.5
"""Audio of one micro-batch: activations of about two bytes per parameter."""

FP32 = 4


@dataclass(frozen=True)
class Prediction:
    """Bytes per parameter on each rank: what it holds between the last backward and the step, and at its peak."""

    parameters: float
    masters: float
    gradients: float
    moments: float
    peak: float


@dataclass(frozen=True)
class Buffers:
    """What comes on top while computing, in elements per parameter of the model."""

    activations: float
    unit: float  # fsdp: parameters that are gathered together, at most
    bucket: float = 0.0  # zero: gradients that are reduced together
    buckets: int = 1  # zero: two where reduction overlaps with the backward
    live: float = 0.0  # zero3: parameters that may stay gathered
    prefetch: float = 0.0  # zero3: parameters that are gathered ahead of their use
    largest: float = 0.0  # zero3: the largest parameter


def predict(engine: str, world_size: int, buffers: Buffers) -> Prediction:
    """Memory of an fp32 model with AdamW (Rajbhandari et al. 2020, arXiv:1910.02054, section 3), as the engines do it.

    A parameter, its gradient and its two moments take four bytes each; a sharded kind takes 1 / world_size of that.
    DeepSpeed steps a copy of the parameters, the masters, even where the model is in fp32 itself. At the peak there
    are all activations and all gradients, and beyond that:

    ddp: nothing, since gradients are the buckets of the reduction.
    fsdp: two gathered units, since the next is on its way, a unit's whole gradient, and what of it is being reduced.
    zero1: whole gradients until the step. It reduces them bucket by bucket into this rank's share of them and then
        flattens that share: two copies of it, which with two ranks and more are no more than what was whole.
    zero2: the backward reduces into the share: a bucket, one that fills meanwhile, and a copy that is being reduced.
        Then the step flattens the share: a second copy, but activations are gone.
    zero3: a bucket; parameters that stay gathered, and those gathered ahead, which are copied out of a buffer; one
        parameter beyond that limit, and one whole gradient. The step flattens as with zero2.
    """
    share = FP32 / world_size
    activations = FP32 * buffers.activations
    bucket = FP32 * buffers.bucket
    if engine == "ddp":
        return Prediction(FP32, 0.0, FP32, 2 * FP32, peak=4 * FP32 + activations)
    if engine == "fsdp":
        return Prediction(share, 0.0, share, 2 * share, peak=4 * share + 4 * FP32 * buffers.unit + activations)
    if engine == "zero1":
        lasting = FP32 + 3 * share
        peak = lasting + max(FP32 + max(activations, 2 * bucket), 2 * share)
        return Prediction(FP32, share, FP32, 2 * share, peak)
    if engine == "zero2":
        lasting = FP32 + 3 * share
        peak = lasting + share + max((buffers.buckets + 1) * bucket + activations, share)
        return Prediction(FP32, share, share, 2 * share, peak)
    if engine == "zero3":
        lasting = 5 * share + bucket
        gathered = FP32 * (min(buffers.live, 1.0) + 2 * buffers.prefetch + 2 * buffers.largest)
        peak = lasting + max(gathered + activations, share)
        return Prediction(share, share, share, 2 * share, peak)
    raise ValueError(f"no prediction for engine {engine}")


def main(result: Path, settings: Annotated[list[str], typer.Argument(metavar="SECTION.KEY=VALUE...")]) -> None:
    """Measure; rank 0 writes RESULT."""
    config = load_config(
        "base", ["precision.compute=fp32", "regularization.layerdrop=0", "batch.micro_batches=2", *settings]
    )
    with process_group(needed=True) as (ranks, device):
        if config.engine.name == "deepspeed":
            import_deepspeed(device)
        batches = [micro_batch(config, number=update * ranks.world_size + ranks.rank) for update in range(UPDATES)]
        activations = plain_forward(config, batches[0], device)
        gc.collect()
        before = memory(device)
        reset_peak(device)
        count = sum(parameter.numel() for parameter in empty_model(build_objective(config)).parameters())
        buffers = working_space(config, activations / FP32 / count, count)
        setup = build(config, device)
        peaks = {"build": peak_memory(device) - before}
        for update, batch in enumerate(batches):
            reset_peak(device)
            setup.window([batch], float(batch.weight * ranks.world_size), update=update)
            peaks[f"backward {update + 1}"] = peak_memory(device) - before
            now = memory(device) - before
            kinds = held(setup.engine)
            reset_peak(device)
            setup.step(1e-4)
            peaks[f"step {update + 1}"] = peak_memory(device) - before
        figures = {
            "parameters": count,
            "predicted": asdict(predict(name_of(config), ranks.world_size, buffers)),
            "held": {kind: size / count for kind, size in kinds.items()},
            "resident": now / count,
            "resident_after_step": (memory(device) - before) / count,
            "peaks": {phase: peak / count for phase, peak in peaks.items()},
            "peak": max(peaks.values()) / count,
            "buffers": asdict(buffers),
        }
        every: list[dict[str, Any]] = [{}] * ranks.world_size
        dist.all_gather_object(every, figures)
        if ranks.is_main:
            result.write_text(json.dumps(max(every, key=lambda one: float(one["peak"]))))
        setup.engine.close()


def name_of(config: Config) -> str:
    """The engine as `predict` calls it: ZeRO by its stage."""
    if config.engine.name != "deepspeed":
        return config.engine.name
    return f"zero{deepspeed_config(config.engine, config.optim, config.precision)['zero_optimization']['stage']}"


def micro_batch(config: Config, *, number: int) -> MicroBatch:
    """One utterance of noise."""
    samples = int(SECONDS * config.model.sampling_rate)
    waveform = np.random.default_rng(number).standard_normal(samples, dtype=np.float32)
    return MicroBatch(number, inputs_of(build_objective(config), [waveform], number=number), samples)


def plain_forward(config: Config, batch: MicroBatch, device: torch.device) -> int:
    """Bytes of activations that a forward saves; forward and backward also load what PyTorch loads at first use."""
    objective, model = build_objective(config), filled_model(config).to(device)
    inputs = to_device(batch.inputs, device)
    parameters = storages(model.parameters())
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        sums = objective.forward(model, inputs, step=StepContext(0, 0, (batch.number,)), training=True)
    activations = sum(size for address, size in saved.items() if address not in parameters)
    sums.total.backward()
    return activations


def working_space(config: Config, activations: float, count: int) -> Buffers:
    """What the settings allow."""
    model = empty_model(build_objective(config))
    block = next(iter(model.encoder.transformer.blocks))
    unit = sum(parameter.numel() for parameter in block.parameters()) / count
    if config.engine.name != "deepspeed":
        return Buffers(activations, unit)
    zero = deepspeed_config(config.engine, config.optim, config.precision)["zero_optimization"]
    return Buffers(
        activations,
        unit,
        bucket=zero["reduce_bucket_size"] / count,
        buckets=1 + bool(zero["overlap_comm"]),
        live=zero.get("stage3_max_live_parameters", 0) / count,
        prefetch=zero.get("stage3_prefetch_bucket_size", 0) / count,
        largest=max(parameter.numel() for parameter in model.parameters()) / count,
    )


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
        for group in [*getattr(zero, "all_grad_tensors", {}).values(), *zero.averaged_gradients.values()]:
            gradients += group or []
    else:
        optimizer, masters = engine.optimizer, []
        parameters = [parameter.data for parameter in engine.model.parameters()]
        gradients += [parameter.grad for parameter in engine.model.parameters()]
    gc.collect()
    # isinstance would run the code of lazily imported modules.
    everything = storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    kinds = {
        "parameters": storages(parameters),
        "masters": storages(masters),
        "moments": storages(value for state in optimizer.state.values() for value in state.values()),
        "gradients": storages(gradients),
    }
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for kind, found in {**kinds, "other": everything}.items():
        sizes[kind] = sum(size for address, size in found.items() if address not in seen)
        seen |= found.keys()
    return sizes


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each piece of memory behind `tensors`, by address: views of one piece count once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor is None or tensor.is_meta:
            continue
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


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
