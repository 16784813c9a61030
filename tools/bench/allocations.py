"""Memory that PyTorch allocates: the most in each phase of some work.

On a GPU its allocator counts. On a CPU the profiler notes each allocation and release. It does not see what another
thread releases, as gloo does with its copies. So where an address is used again, it has been released; and where it is
said that Python knows all tensors, what none of them refers to has been released, too.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "phase of allocations: "


class Allocations:
    """Records allocations on `device` from when it is entered. Afterwards `peaks` has the most bytes of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.before = 0
        self.there: dict[str, set[int]] = {}  # addresses of all tensors at the beginning of a phase
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> Allocations:
        if self.on_gpu:
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.on_gpu:
            self.profiler.__exit__(*error)
            self.peaks = _peaks(*_events(self.profiler), self.there)

    @contextmanager
    def phase(self, name: str, *, all_known: bool = False) -> Iterator[None]:
        """Name the work in the block. `all_known`: at its beginning, Python knows all tensors that are in use."""
        if not self.on_gpu:
            if all_known:
                self.there[name] = set(storages(living_tensors()))
            with record_function(f"{MARK}{name}"):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - self.before


class Change(NamedTuple):
    """An allocation or, with negative `size`, a release."""

    time: int
    address: int
    size: int


class Phase(NamedTuple):
    """When a phase began and ended."""

    begin: int
    end: int
    name: str


def _events(profiler: profile) -> tuple[list[Change], list[Phase]]:
    changes: list[Change] = []
    phases: list[Phase] = []
    waiting: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            if event.extra_fields.device.type == "cpu":
                changes.append(Change(event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name.startswith(MARK):
            phases.append(Phase(event.start_time_ns, event.end_time_ns, event.name.removeprefix(MARK)))
    return sorted(changes), sorted(phases)


def _peaks(changes: Iterable[Change], phases: Iterable[Phase], there: dict[str, set[int]]) -> dict[str, int]:
    """The most bytes in each phase."""
    left, peaks, live = iter(changes), dict[str, int](), dict[int, int]()
    change = next(left, None)
    for phase in phases:
        while change is not None and change.time < phase.begin:
            _follow(live, change)
            change = next(left, None)
        if phase.name in there:
            live = {address: size for address, size in live.items() if address in there[phase.name]}
        peaks[phase.name] = total = sum(live.values())
        while change is not None and change.time <= phase.end:
            total += _follow(live, change)
            peaks[phase.name] = max(peaks[phase.name], total)
            change = next(left, None)
    return peaks


def _follow(live: dict[int, int], change: Change) -> int:
    """Note a change; by how many bytes the total grows."""
    released = live.pop(change.address, 0)
    if change.size > 0:
        live[change.address] = change.size
    return max(change.size, 0) - released


def living_tensors() -> Iterator[Tensor]:
    """Yield all tensors that Python knows."""
    gc.collect()
    # isinstance would run the code of lazily imported modules.
    return (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))


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
