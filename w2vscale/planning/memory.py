"""Memory of each engine on one rank: what it holds, and what comes on top while it computes, in bytes.

What is sharded follows Rajbhandari et al. 2020 (arXiv:1910.02054, section 3). Buffers follow the code of PyTorch's DDP
and FSDP2 and of DeepSpeed 0.19.8. tools/bench/plan_memory.py compares the result with measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w2vscale.planning.footprint import Bytes, Demand, Footprint
from w2vscale.planning.timeline import Timeline
from w2vscale.planning.traffic import FP32, Sharding
from w2vscale.planning.work import Model

FLATTENED = 500_000_000
"""Elements that ZeRO-1 in bf16 flattens at once to reduce them (MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed)."""


def demand(model: Model, sharding: Sharding, *, forwards: int) -> Demand:
    """Return what an engine needs for updates of `forwards` forwards on each rank."""
    build: dict[str, Callable[[_Setting], Demand]] = {
        "ddp": _ddp,
        **dict.fromkeys(("fsdp", "fsdp_keep", "hsdp"), _fsdp),
        "zero1": _zero1,
        "zero2": _zero2,
        "zero3": _zero3,
    }
    if sharding.engine == "zero1" and sharding.working_bytes < FP32:
        build["zero1"] = _zero1_in_bf16
    one = _Setting(model, sharding, forwards)
    needed = build[sharding.engine](one)
    return _on_host(one, needed) if sharding.offloads else needed


@dataclass(frozen=True)
class _Setting:
    model: Model
    sharding: Sharding
    forwards: int

    @property
    def timeline(self) -> Timeline:
        return self.model.timeline

    @property
    def nothing(self) -> Bytes:
        return np.zeros(len(self.timeline.unit))

    @property
    def frozen(self) -> int:
        return self.model.parameters - self.model.trained

    def collected(self, *, whole_from_the_first: bool = False) -> Bytes:
        """Elements of all gradients that earlier moments have completed.

        From the second forward of an update on, gradients of all parameters are there.
        """
        if self.forwards > 1 or whole_from_the_first:
            return np.full(len(self.timeline.unit), float(self.model.trained))
        return _before(self.timeline.gradient)


def _on_host(one: _Setting, needed: Demand) -> Demand:
    """Move to host memory what an engine offloads: with ZeRO-2 all but working weights, else all that is sharded."""
    model, ranks, width = one.model, one.sharding.shard_size, one.sharding.working_bytes
    share = FP32 * model.trained / ranks
    parameters, host = 0.0, needed.parameters + needed.moments + share
    if one.sharding.engine == "zero2":
        parameters = width * model.trained + FP32 * one.frozen
        # Gradients of earlier backwards, and stepped weights on their way to the GPU.
        host += share * (one.forwards > 1) + width * model.trained / ranks - parameters
    return Demand(one.timeline, parameters, 0.0, one.nothing, needed.buffers, host=host)


def _before(elements: NDArray[np.int64]) -> Bytes:
    """Sums of all elements before each place."""
    sums: Bytes = (np.cumsum(elements) - elements).astype(np.float64)
    return sums


def _ddp(one: _Setting) -> Demand:
    """Whole state on each rank. Gradients are views of the buckets of the reduction, which always exist."""
    model, several = one.model, one.sharding.ranks > 1
    copies = one.sharding.working_bytes * float(model.cast) * (one.sharding.working_bytes < FP32)
    gradients = FP32 * one.collected(whole_from_the_first=several)
    parameters, moments = FP32 * float(model.parameters), 2.0 * FP32 * model.trained
    # Before the first forward DDP builds its buckets a second time, in the order of the backward.
    rebuilt = Footprint(parameters, 2.0 * FP32 * model.trained, moments, 0.0, copies)
    return Demand(
        one.timeline, parameters, moments, gradients, one.nothing + copies, elsewhere=(rebuilt,) if several else ()
    )


def _fsdp(one: _Setting) -> Demand:
    """Shards, and units that are gathered for the moment.

    A unit is gathered into a buffer and copied out of it. The buffer of a forward stays until the next unit has its
    own; in the backward the next unit is gathered ahead. Gradients of a unit are whole until its backward ends. Then
    they are copied into the fp32 input of a reduce-scatter, which stays until the next unit has its own.
    """
    sharding, line, units = one.sharding, one.timeline, one.model.units
    ranks, rest = sharding.shard_size, len(units) - 1
    sizes = [float(unit.padded(ranks)) for unit in units]
    trained = [max(size - unit.frozen, 0.0) for size, unit in zip(sizes, units, strict=True)]
    widths = [FP32 if unit.whole else sharding.working_bytes for unit in units]
    gathered = [width * size for width, size in zip(widths, sizes, strict=True)]
    buffer = gathered if ranks > 1 else [0.0] * len(units)
    # gloo reduces a copy of the input, and FSDP2 divides a copy where there is nothing to reduce.
    inputs = 2 if one.model.device == "cpu" or ranks == 1 else 1
    everything = sum(trained)

    def kept(unit: int) -> float:
        """What is gathered while a unit runs; without resharding also all units before it, in both passes."""
        if sharding.reshards:
            return gathered[rest] + (gathered[unit] if unit != rest else 0.0)
        return gathered[rest] + sum(gathered[: min(unit + 1, rest)])

    gradients, buffers = one.nothing, one.nothing
    waiting = buffer[rest]  # in the buffer of the unit that was gathered last
    computed = [0.0] * len(units)  # elements of whole gradients
    reducing, reduced = 0.0, 0.0  # bytes of the last input, elements in shards
    last = {unit: place for place, unit in enumerate(line.unit.tolist()) if line.backward[place]}
    for place, unit in enumerate(line.unit.tolist()):
        accumulated = everything if one.forwards > 1 else reduced
        gradients[place] = FP32 * accumulated / ranks
        if not sharding.reshards and one.forwards > 1:  # whole until the last backward reduces them
            gradients[place] = FP32 * (everything - reduced + reduced / ranks)
        if not line.backward[place]:
            waiting = buffer[unit] if unit != rest else waiting
            buffers[place] = kept(unit) + waiting
            continue
        ahead = min(unit, rest) - 1
        waiting = buffer[ahead] if ahead >= 0 and sharding.reshards else 0.0
        whole = widths[rest] * computed[rest]
        running = kept(unit) + waiting + reducing + (widths[unit] * computed[unit] if unit != rest else 0.0)
        computed[unit] += float(line.gradient[place])
        if place == last[unit]:
            reducing = FP32 * trained[unit]
            outgoing = inputs * reducing + reducing / ranks + widths[unit] * trained[unit]
            running = max(running, kept(rest) + waiting + outgoing)
            reduced += trained[unit]
        buffers[place] = running + whole
    share = FP32 / ranks
    return Demand(line, share * sum(sizes), 2.0 * share * everything, gradients, buffers)


def _zero1(one: _Setting) -> Demand:
    """Sharded masters and moments. Gradients are whole until the step, which reduces them in a bucket."""
    model, ranks = one.model, one.sharding.ranks
    share = FP32 * model.trained / ranks
    bucket = FP32 * float(one.sharding.zero["reduce_bucket_size"])
    buffers = one.nothing + (bucket if one.forwards > 1 else bucket * one.timeline.backward)
    parameters, moments = FP32 * model.parameters + share, 2.0 * share
    # The step flattens this share of the gradients.
    step = Footprint(parameters, 2.0 * share, moments, 0.0, 0.0)
    return Demand(one.timeline, parameters, moments, FP32 * one.collected(), buffers, elsewhere=(step,))


def _zero1_in_bf16(one: _Setting) -> Demand:
    """As in fp32, with fp32 accumulators of all gradients, and those of the last backward in bf16."""
    model, ranks, width = one.model, one.sharding.ranks, one.sharding.working_bytes
    share = FP32 * model.trained / ranks
    parameters, moments = width * model.trained + FP32 * one.frozen + share, 2.0 * share
    accumulators = FP32 * float(model.trained)
    # The step reduces flattened copies.
    flattened = FP32 * float(min(model.trained, FLATTENED + model.largest))
    step = Footprint(parameters, accumulators + width * model.trained, moments, 0.0, flattened)
    gradients = accumulators + width * one.collected()
    return Demand(one.timeline, parameters, moments, gradients, one.nothing, elsewhere=(step,))


def _zero2(one: _Setting) -> Demand:
    """Sharded gradients, too. Each backward fills buckets, and reduces flattened copies of them."""
    model, ranks, width = one.model, one.sharding.ranks, one.sharding.working_bytes
    zero, line = one.sharding.zero, one.timeline
    share = FP32 * model.trained / ranks
    size = int(zero["reduce_bucket_size"])
    buckets = (1 + bool(zero.get("overlap_comm"))) * width * size
    copies = width + (FP32 if width < FP32 else 0)
    buffers: Bytes = buckets * line.backward + copies * _flushed(line, size)
    earlier, flushed = one.forwards > 1, np.maximum.accumulate(_flushed(line, size) > 0)
    # In fp32 the share of a backward is apart from that of the backwards before.
    gradients = share * np.where(flushed, 2.0 if earlier and width == FP32 else 1.0, float(earlier))
    parameters, moments = width * model.trained + FP32 * one.frozen + share, 2.0 * share
    step = Footprint(parameters, 2.0 * share if width == FP32 else share, moments, 0.0, 4.0 * FP32 * model.largest)
    return Demand(line, parameters, moments, gradients, buffers, elsewhere=(step,))


def _zero3(one: _Setting) -> Demand:
    """Sharded parameters, too. Those of the next units stay gathered, as many as `stage3_max_live_parameters`."""
    model, ranks, width = one.model, one.sharding.ranks, one.sharding.working_bytes
    zero, line = one.sharding.zero, one.timeline
    share = FP32 * model.trained / ranks
    size = int(zero["reduce_bucket_size"])
    copies = FP32 + (FP32 if width < FP32 else 0)  # flattened gradients, and casts of them
    buffers = one.nothing + FP32 * size + copies * _flushed(line, size)
    if ranks > 1:
        needed = np.where(line.backward, model.trained - _before(line.gradient), model.parameters)
        live = np.minimum(needed, zero["stage3_max_live_parameters"])
        # Parameters are copied out of the buffers that they are gathered into.
        on_their_way = np.minimum(needed - live * line.backward, zero["stage3_prefetch_bucket_size"])
        buffers += width * (live + on_their_way)
    parameters = (width * model.trained + FP32 * one.frozen) / ranks + share
    step = Footprint(parameters, 2.0 * share, 2.0 * share, 0.0, FP32 * float(size))
    return Demand(line, parameters, 2.0 * share, one.nothing + share, buffers, elsewhere=(step,))


def _flushed(line: Timeline, size: int) -> Bytes:
    """Elements that each moment reduces: a bucket that has no room for the next gradient, and the last one."""
    flushed, filled = np.zeros(len(line.unit)), 0
    for place, elements in enumerate(line.gradient.tolist()):
        if elements and filled and filled + elements > size:
            flushed[place], filled = filled, 0
        filled += elements
    flushed[-1] = filled
    return flushed
