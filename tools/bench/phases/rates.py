"""Training rates of `base` and `large`, ours and those of Transformers, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from tools.bench import step_profile
from tools.bench.contenders import LR, Work, synchronize, their_step
from tools.bench.phases.environment import matrix_flops
from tools.bench.phases.measuring import PEAK_FLOPS, Machine, Rows, attempt, release_memory
from tools.bench.running import Setup, build
from w2vscale import runtime
from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.transforms import compiled_graphs
from w2vscale.training.pending import HostCopy

Lengths = Literal["equal", "bucket"]


@dataclass(frozen=True)
class Forms:
    """Forwards to measure: seconds of the longest utterance, and utterances of a short forward and of long ones.

    The short one is a preset's micro-batch. An update has the audio of the longest.
    """

    seconds: float
    utterances: tuple[int, ...]

    def name(self, utterances: int) -> str:
        """A forward in a row's key."""
        return f"{utterances}x{self.seconds:g}s"

    def all(self) -> list[tuple[int, Lengths]]:
        """Utterances of each forward, and whether they differ in length: in the shortest and in the longest."""
        equal: list[tuple[int, Lengths]] = [(utterances, "equal") for utterances in self.utterances]
        return [*equal, (min(self.utterances), "bucket"), (max(self.utterances), "bucket")]


FORMS = {"base": Forms(15.6, (5, 20, 40)), "large": Forms(20.0, (3, 12, 24))}
TINY = Forms(0.5, (1, 2))

UPDATES = 5
"""Timed updates of each form."""


def rates_base(machine: Machine) -> Rows:
    """See `_rates`."""
    yield from _rates(machine, "base")


def rates_large(machine: Machine) -> Rows:
    """See `_rates`."""
    yield from _rates(machine, "large")


def _rates(machine: Machine, name: str) -> Rows:
    """Seconds of audio per second of updates in bf16 by DDP: eager and compiled, short and long forwards, equal lengths
    and lengths of one bucket (which are packed).

    An update has the audio of the longest forward, in as many forwards as it takes.
    """
    # First, because CUDA reads the settings of its allocator only once.
    runtime.prepare_process(compile=not machine.tiny)
    yield "matrix_flops", matrix_flops(machine.device, 256 if machine.tiny else 8192)
    for compiled in (False, True):
        config = machine.config(name, "precision.compute=bf16", f"engine.compile={str(compiled).lower()}")
        forms = _forms(machine, name)
        skipped = compiled and machine.tiny  # takes a minute on a CPU
        setup = None if skipped else build(config, machine.device)
        for utterances, lengths in forms.all():
            key = f"{'compiled' if compiled else 'eager'}/{forms.name(utterances)}/{lengths}"
            measure = partial(_rate, machine, config, setup, forms, utterances, lengths)
            yield key, None if skipped else attempt(measure)
            del measure
        if setup is not None:
            setup.engine.close()
        del setup
        release_memory()


def _forms(machine: Machine, name: str) -> Forms:
    return TINY if machine.tiny else FORMS[name]


def _batches(machine: Machine, work: Work, count: int) -> list[MicroBatch]:
    batches = [work.batch(number) for number in range(count)]
    return [batch.pin_memory() for batch in batches] if machine.on_gpu else batches


def _rate(
    machine: Machine, config: Config, setup: Setup | None, forms: Forms, utterances: int, lengths: Lengths
) -> dict[str, Any]:
    assert setup is not None
    device, most = machine.device, max(forms.utterances)
    window = _batches(machine, Work(config, utterances, forms.seconds, lengths), most // utterances)
    weight = float(sum(batch.weight for batch in window))
    audio = sum(batch.audio_samples for batch in window) / config.model.sampling_rate
    # Without padding, which only the feature encoder computes.
    flops = audio / forms.seconds * Work(config, 1, forms.seconds).flops()
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    host, windows, updates = [], [], []
    for number in range(2 + (1 if machine.tiny else UPDATES)):
        synchronize(device)
        began = time.perf_counter()
        setup.window(window, weight)
        asked = time.perf_counter()
        synchronize(device)
        computed = time.perf_counter()
        setup.step(LR, config.optim.max_norm)
        synchronize(device)
        if number >= 2:
            host.append(asked - began)
            windows.append(computed - began)
            updates.append(time.perf_counter() - began)
    seconds, windows_median = statistics.median(updates), statistics.median(windows)
    streamed = _streamed(setup, window, weight, 1 if machine.tiny else 2 * UPDATES, device)
    return {
        "audio_per_second": audio / streamed,
        "audio_per_second_waiting": audio / seconds,
        "mfu": flops / streamed / PEAK_FLOPS,
        "flops_per_second": flops / streamed,
        "forward_seconds": audio / len(window),
        # An estimate with one optimizer step per forward, which is what the steps of Transformers are.
        "audio_per_second_stepping": audio / (windows_median + len(window) * (seconds - windows_median)),
        "window_ms": 1000 * windows_median,
        "host_ms": 1000 * statistics.median(host),
        "step_ms": 1000 * (seconds - windows_median),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if machine.on_gpu else None,
    }


def _streamed(setup: Setup, window: list[MicroBatch], weight: float, count: int, device: torch.device) -> float:
    """Seconds of an update in the training loop, which reads the norm of each update one update late."""
    previous = None
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        setup.window(window, weight)
        norm = HostCopy(setup.step(LR, setup.config.optim.max_norm))
        if previous is not None:
            previous.read()
        previous = norm
    synchronize(device)
    return (time.perf_counter() - began) / count


def transformers_base(machine: Machine) -> Rows:
    """See `_transformers`."""
    yield from _transformers(machine, "base")


def transformers_large(machine: Machine) -> Rows:
    """See `_transformers`."""
    yield from _transformers(machine, "large")


def _transformers(machine: Machine, name: str) -> Rows:
    """Seconds of audio per second of training steps of Transformers on the same micro-batches, eager and compiled."""
    forms = _forms(machine, name)
    for kind, size in (("compiled", 1), ("eager", 1)):
        utterances = forms.utterances[size]
        key = f"{kind}/{forms.name(utterances)}/equal"
        if kind == "compiled" and machine.tiny:  # takes minutes on a CPU
            yield key, None
            continue
        torch._dynamo.reset()  # a second model that shares code with the first fails to compile
        yield key, attempt(partial(_their_rate, machine, name, forms, utterances, kind == "compiled"))


def _their_rate(machine: Machine, name: str, forms: Forms, utterances: int, compiled: bool) -> dict[str, Any]:
    config = machine.config(name, "precision.compute=bf16")
    step = their_step(config, machine.device, compiled=compiled)
    (batch,) = _batches(machine, Work(config, utterances, forms.seconds), 1)
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats(machine.device)
    for _ in range(1 if machine.tiny else 2):
        step(batch)
    count = 1 if machine.tiny else 2 * UPDATES
    synchronize(machine.device)
    began = time.perf_counter()
    for _ in range(count):  # as in a training loop: nothing waits for a step
        step(batch)
    synchronize(machine.device)
    seconds = (time.perf_counter() - began) / count
    return {
        "audio_per_second": batch.audio_samples / config.model.sampling_rate / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(machine.device) if machine.on_gpu else None,
    }


def profile(machine: Machine) -> Rows:
    """Of one update: time by module and by kernel, kernels launched, and the time in which the device was busy."""
    for name in ("base", "large"):
        forms, config = _forms(machine, name), machine.config(name, "precision.compute=bf16")
        setup = build(config, machine.device, prepare=step_profile.mark_modules)
        for utterances in forms.utterances[:2]:
            work = Work(config, utterances, forms.seconds, "bucket")
            yield f"{name}/{forms.name(utterances)}", attempt(partial(_profile, machine, setup, work))
        setup.engine.close()


def _profile(machine: Machine, setup: Setup, work: Work) -> dict[str, Any]:
    window = _batches(machine, work, 1)
    weight = float(window[0].weight)

    def update() -> None:
        setup.window(window, weight)
        with torch.profiler.record_function(step_profile.MARK + step_profile.OPTIMIZER):
            setup.step(LR, work.config.optim.max_norm)
        synchronize(machine.device)

    update()
    began = time.perf_counter()
    update()
    wall = time.perf_counter() - began
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * machine.on_gpu]
    with record(activities=activities) as profiler:
        update()
    events = profiler.events() or []
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels = [event for event in kernels if not event.name.startswith(step_profile.MARK)]
    return {
        "wall_ms": 1000 * wall,
        "busy_ms": sum(event.self_device_time_total for event in kernels) / 1000 if machine.on_gpu else None,
        "launches": len(kernels) if machine.on_gpu else None,
        "launches_per_audio_second": len(kernels) / (work.utterances * work.seconds) if machine.on_gpu else None,
        "modules_ms": {
            module: {way: 1000 * seconds for way, seconds in times.items()}
            for module, times in step_profile.by_module(events).items()
        },
        "kernels_ms": {
            kernel[:120]: 1000 * seconds for kernel, seconds in list(step_profile.by_kernel(events).items())[:25]
        },
    }


def recompilations(machine: Machine) -> Rows:
    """Graphs that torch.compile makes, and the time that it takes, over forwards of many shapes."""
    if machine.tiny:  # takes a minute on a CPU
        yield from (("graphs", None), ("compiling_seconds", None), ("median_ms", None))
        return
    config = machine.config("base", "precision.compute=bf16", "engine.compile=true", "model.layers=3")
    setup = build(config, machine.device)
    draws = np.random.default_rng(0)
    compiling = 0.0
    graphs: dict[int, int] = {}
    times: list[float] = []
    for number in range(60):
        seconds = float(draws.uniform(3.0, 15.6))
        work = Work(config, max(1, int(78 / seconds)), seconds, "bucket" if number % 2 else "equal")
        batch = work.batch(number).pin_memory()
        took = _timed(partial(setup.window, [batch], 1.0), machine.device)
        times.append(took)
        if compiled_graphs() > graphs.get(len(times) - 1, 0):
            compiling += took
        graphs[len(times)] = compiled_graphs()
    yield "graphs", graphs
    yield "compiling_seconds", compiling
    yield "median_ms", 1000 * statistics.median(times)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began
