"""What each engine needs on a rank while it computes, beside activations.

The rules follow the code of DDP and FSDP2 in PyTorch and of DeepSpeed 0.19.8. tools/bench/plan_memory.py compares what
comes of them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from w2vscale.planning.footprint import Bytes, Demand, Footprint
from w2vscale.planning.state import State, state_of
from w2vscale.planning.timeline import Timeline
from w2vscale.planning.traffic import FP32, Sharding
from w2vscale.planning.work import Model

FLATTENED = 500_000_000
"""Elements that ZeRO-1 in bf16 flattens at once to reduce them (MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed)."""


def demand(model: Model, sharding: Sharding, *, forwards: int) -> Demand:
    """Return what an engine needs for updates of `forwards` forwards on each rank."""
    rules: dict[str, Callable[[_Setting], Demand]] = {
        "ddp": _ddp,
        **dict.fromkeys(("fsdp", "fsdp_keep", "hsdp"), _fsdp),
        "zero1": _zero1_in_bf16 if sharding.working_bytes < FP32 else _zero1,
        "zero2": _zero2,
        "zero3": _zero3,
    }
    setting = _Setting(model, sharding, accumulates=forwards > 1)
    needed = rules[sharding.engine](setting)
    return _on_host(setting, needed) if sharding.offloads else needed


@dataclass(frozen=True)
class _Setting:
    model: Model
    sharding: Sharding
    accumulates: bool  # there are several forwards, so that gradients exist during all but the first

    @cached_property
    def line(self) -> Timeline:
        return self.model.timeline

    @cached_property
    def state(self) -> State:
        return state_of(self.model, self.sharding)

    @property
    def nothing(self) -> Bytes:
        return np.zeros(len(self.line.unit))

    def earlier(self) -> Bytes:
        """Elements of the gradients that earlier moments have completed."""
        if self.accumulates:
            return self.nothing + self.model.trained
        return _before(self.line.gradient)

    def demand(self, gradients: Bytes, buffers: Bytes, *elsewhere: Footprint) -> Demand:
        """Add what the engine holds all the time."""
        state = self.state
        kept = state.moments + state.average
        return Demand(self.line, state.parameters + state.masters, kept, gradients, buffers, elsewhere)

    def elsewhere(self, gradients: float, buffers: float = 0.0) -> Footprint:
        """What there is outside of forward and backward."""
        state = self.state
        return Footprint(state.parameters + state.masters, gradients, state.moments + state.average, 0.0, buffers)


def _on_host(one: _Setting, needed: Demand) -> Demand:
    """Move to host memory what an engine offloads: with ZeRO-2 all but working weights, else all that is sharded."""
    state, engine = one.state, one.sharding.engine
    stays = state.parameters if engine == "zero2" else 0.0
    host = sum(state) - stays
    if one.model.config.checkpoint.asynchronous:  # copies weights, moments and average, to write them meanwhile
        host += 1.5 * state.moments + state.average
    if engine == "zero2":
        # Gradients of earlier backwards, and stepped weights on their way to the GPU.
        host += state.gradients * one.accumulates + one.sharding.working_bytes * state.masters / FP32
    return Demand(one.line, stays, 0.0, one.nothing, needed.buffers, host=host)


def _before(elements: NDArray[np.int64]) -> Bytes:
    """Sums of all elements before each place."""
    return (np.cumsum(elements) - elements).astype(np.float64)


def _ddp(one: _Setting) -> Demand:
    """With several ranks, gradients are views into the all-reduce buckets, which are allocated at the start."""
    width, several = one.sharding.working_bytes, one.sharding.ranks > 1
    copies = float(width * one.model.cast if width < FP32 else 0)
    gradients = one.nothing + one.state.gradients if several else FP32 * one.earlier()
    # Before the first forward, DDP rebuilds its buckets in the order of the backward. Both sets exist meanwhile.
    rebuilding = [one.elsewhere(2.0 * one.state.gradients, copies)] if several else []
    return one.demand(gradients, one.nothing + copies, *rebuilding)


def _fsdp(one: _Setting) -> Demand:
    """A unit has unsharded parameters while it runs, and unsharded gradients in its backward.

    Parameters are copied out of an all-gather buffer. In the forward the buffer lives until the next all-gather; in the
    backward the next unit is prefetched. At the end of the backward of a unit, its gradients are copied into a fp32
    reduce-scatter input, which lives until the next reduce-scatter.
    """
    sharding, line, units = one.sharding, one.line, one.model.units
    ranks, rest = sharding.shard_size, len(units) - 1
    sizes = [float(unit.padded(ranks)) for unit in units]
    trained = [max(size - unit.frozen, 0.0) for size, unit in zip(sizes, units, strict=True)]
    widths = [FP32 if unit.whole else sharding.working_bytes for unit in units]
    gathered = [width * size for width, size in zip(widths, sizes, strict=True)]
    buffer = gathered if ranks > 1 else [0.0] * len(units)  # all-gather buffers
    # gloo copies the reduce-scatter input, and with one rank FSDP2 does.
    inputs = 2 if one.model.device == "cpu" or ranks == 1 else 1
    everything = sum(trained)

    def kept(unit: int) -> float:
        """Unsharded parameters while a unit runs; without resharding also of all units before it, in both passes."""
        first = unit if sharding.reshards else 0
        return gathered[rest] + sum(gathered[first : min(unit + 1, rest)])

    gradients, buffers = one.nothing, one.nothing
    waiting = buffer[rest]  # the newest all-gather buffer
    whole = [0.0] * len(units)  # elements of unsharded gradients
    reducing, reduced = 0.0, 0.0  # bytes of the newest reduce-scatter input, elements of sharded gradients
    last = {unit: place for place, unit in enumerate(line.unit.tolist()) if line.backward[place]}
    for place, unit in enumerate(line.unit.tolist()):
        gradients[place] = FP32 * (everything if one.accumulates else reduced) / ranks
        if one.accumulates and not sharding.reshards:  # unsharded until the last backward reduces them
            gradients[place] = FP32 * (everything - reduced + reduced / ranks)
        if not line.backward[place]:
            waiting = buffer[unit] if unit != rest else waiting
            buffers[place] = kept(unit) + waiting
            continue
        ahead = min(unit, rest) - 1
        waiting = buffer[ahead] if ahead >= 0 and sharding.reshards else 0.0
        of_rest = widths[rest] * whole[rest]
        running = kept(unit) + waiting + reducing + (widths[unit] * whole[unit] if unit != rest else 0.0)
        whole[unit] += float(line.gradient[place])
        if place == last[unit]:
            reducing = FP32 * trained[unit]
            ending = inputs * reducing + reducing / ranks + widths[unit] * trained[unit]
            running = max(running, kept(rest) + waiting + ending)
            reduced += trained[unit]
        buffers[place] = running + of_rest
    return one.demand(gradients, buffers)


def _zero1(one: _Setting) -> Demand:
    """Gradients are unsharded until the step, which reduces them through a bucket."""
    bucket = FP32 * float(one.sharding.zero["reduce_bucket_size"])
    buffers = one.nothing + bucket * (one.line.backward | one.accumulates)
    # The step flattens the gradients of this partition.
    return one.demand(FP32 * one.earlier(), buffers, one.elsewhere(2.0 * one.state.masters))


def _zero1_in_bf16(one: _Setting) -> Demand:
    """Gradients are accumulated in fp32, beside the bf16 ones of a backward. The step reduces flattened copies."""
    width, trained = one.sharding.working_bytes, float(one.model.trained)
    flattened = FP32 * min(trained, float(FLATTENED + one.model.largest))
    gradients = FP32 * trained + width * one.earlier()
    return one.demand(gradients, one.nothing, one.elsewhere(one.state.gradients, flattened))


def _zero2(one: _Setting) -> Demand:
    """Each backward fills reduction buckets, and reduces flattened copies of them."""
    width, zero, line = one.sharding.working_bytes, one.sharding.zero, one.line
    size, mixed = int(zero["reduce_bucket_size"]), width < FP32
    flushed = _flushed(line, size)
    buckets = (1 + bool(zero.get("overlap_comm"))) * width * size
    buffers = buckets * line.backward + (width + FP32 * mixed) * flushed
    # In fp32 the gradient partition of a backward is apart from the accumulated one.
    sets = np.where(np.maximum.accumulate(flushed) > 0, 2 if one.accumulates and not mixed else 1, one.accumulates)
    share = one.state.gradients
    # The step flattens the gradient partition, or takes the norm of each parameter in fp64.
    step = one.elsewhere(share if mixed else 2.0 * share, 4.0 * FP32 * one.model.largest)
    return one.demand(share * sets, buffers, step)


def _zero3(one: _Setting) -> Demand:
    """Up to `stage3_max_live_parameters` stay gathered. Each backward reduces copies of gradients."""
    model, width, zero, line = one.model, one.sharding.working_bytes, one.sharding.zero, one.line
    size = int(zero["reduce_bucket_size"])
    copies = FP32 + (FP32 if width < FP32 else 0)  # flattened gradients, and casts of them
    buffers = one.nothing + FP32 * size + copies * _flushed(line, size)
    if one.sharding.ranks > 1:
        needed = np.where(line.backward, model.trained - _before(line.gradient), model.parameters)
        live = np.minimum(needed, zero["stage3_max_live_parameters"])
        # Parameters are copied out of all-gather buffers, of `stage3_prefetch_bucket_size` at most.
        on_their_way = np.minimum(needed - live * line.backward, zero["stage3_prefetch_bucket_size"])
        buffers += width * (live + on_their_way)
    step = one.elsewhere(2.0 * one.state.gradients, FP32 * float(size))
    return one.demand(one.nothing + one.state.gradients, buffers, step)


def _flushed(line: Timeline, size: int) -> Bytes:
    """Elements that each moment reduces: a bucket is flushed if the next gradient does not fit, and at the end."""
    flushed, filled = np.zeros(len(line.unit)), 0
    for place, elements in enumerate(line.gradient.tolist()):
        if elements and filled and filled + elements > size:
            flushed[place], filled = filled, 0
        filled += elements
    flushed[-1] = filled
    return flushed
