"""Shared by all phases: the machine, timers, and a wrapper for measurements that may fail."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkContext, SpawnContext
from typing import Any

import torch
from torch import Tensor

from tools.bench.contenders import synchronize
from w2vscale.config import Config, load_config

PEAK_FLOPS = 8e14
"""What an H100 sustains in bf16 matrix products."""

Rows = Iterator[tuple[str, Any]]
"""Figures by key, in the order in which they were measured."""


@dataclass(frozen=True)
class Machine:
    """Where a phase measures. `tiny`: with small models and few repetitions, so that the tests can run it."""

    device_name: str
    tiny: bool

    @property
    def device(self) -> torch.device:
        """The device itself."""
        return torch.device(self.device_name)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def config(self, name: str, *settings: str) -> Config:
        """The settings of preset `name`, without LayerDrop and, unless `settings` say otherwise, without compilation.

        With `tiny`, those of a model of one block instead.
        """
        changes = ["regularization.layerdrop=0", "engine.compile=false", *settings]
        if not self.tiny:
            return load_config(name, changes)
        return load_config("tiny", ["model.positional_kernel=16", *changes, "model.layers=1"])


def process_context(machine: Machine) -> SpawnContext | ForkContext:
    """How to start a process: a fork has all imports, but a fork of a process that has used CUDA cannot use it."""
    return SpawnContext() if machine.on_gpu else ForkContext()


def median_ms(work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 3) -> float:
    """Median time of `work` in milliseconds; on a GPU that between two events of its stream."""
    for _ in range(warm_up):
        work()
    return statistics.median(one_ms(work, device) for _ in range(repeats))


def one_ms(work: Callable[[], object], device: torch.device) -> float:
    """Time of `work` in milliseconds, until the device has done it."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def forward_and_backward(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Work that computes `function(*leaves)` and the gradients of all leaves that require one."""

    def work() -> None:
        y = function(*leaves)
        torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], torch.ones_like(y))

    return work


def attempt(measure: Callable[[], Any]) -> Any:
    """Return what `measure` returns, or {"error": …} if it fails: the device may lack the kernel or the memory."""
    try:
        return measure()
    except Exception as error:  # of any library; the traceback is in the phase's log, and the row names it
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
    finally:
        release_memory()


def release_memory() -> None:
    """Free a GPU's cached memory, so that one measurement does not run out of memory because of another."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
