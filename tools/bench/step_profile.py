"""Where the time of a training step goes: by module, forward and backward, and by kernel.

    python tools/bench/step_profile.py                             `base`, 4 utterances of 10 s, in fp32
    python tools/bench/step_profile.py --preset large --seconds 15 precision.compute=bf16 engine.compile=true

PyTorch's profiler looks at one step. What the backward computes belongs to the module whose forward made it. On a GPU
the times are the GPU's. Leaves a Chrome trace (chrome://tracing, ui.perfetto.dev) and a bar chart.

(Not `profile.py`: that is the name of a module of Python's own, which a script in the same folder would hide.)
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tools.bench.contenders import LR, Work, work_settings
from tools.bench.running import build
from tools.bench.script import console, run_script
from w2vscale.analysis.figures import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[2]
MARK = "module: "
OPTIMIZER = "clipping and AdamW"
LOSS = "loss, and what is between modules"
KERNELS = 12
"""That are shown."""

Seconds = dict[str, dict[str, float]]
"""Of each module's forward and backward."""


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
    preset: Annotated[str, typer.Option(help="Whose model.")] = "base",
    utterances: Annotated[int, typer.Option(min=1, help="Of a step.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of an utterance.")] = 10.0,
    folder: Annotated[Path, typer.Option(file_okay=False, help="For trace.json.gz and step.png.")] = ROOT
    / "exp"
    / "bench"
    / "profile",
) -> None:
    """Profile a training step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = work_settings(preset, ["precision.compute=fp32", *(settings or [])])
    batch = Work(config, utterances, seconds).batch()
    setup = build(config, device, prepare=mark_modules)

    def step() -> None:
        setup.window([batch], float(batch.weight))
        with record_function(MARK + OPTIMIZER):
            setup.step(LR, config.optim.max_norm)

    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    events = profiler.events() or []
    modules, kernels = by_module(events), by_kernel(events)
    print_tables(modules, kernels)
    draw(modules, kernels, folder / "step.png", title=f"{preset}, {utterances} x {seconds:g} s, {device.type}")
    console.print(f"{folder / 'step.png'}, {folder / 'trace.json.gz'}")
    print(json.dumps({"preset": preset, "device": str(device), "modules": modules, "kernels": kernels}))


def mark_modules(model: nn.Module) -> None:
    """Have the profiler see when a module computes."""
    for name, module in model.named_modules():
        if (label := label_of(name)) is not None:
            _mark(module, MARK + label)


def label_of(name: str) -> str | None:
    """What a module's time is shown under; None for what belongs to the module around it."""
    if name == "":
        return LOSS
    if name in ("quantizer", "context_projection", "target_projection"):
        return "quantizer" if name == "quantizer" else "projections of the loss"
    name = name.removeprefix("encoder.")
    if match := re.fullmatch(r"feature_encoder\.layers\.(\d+)", name):
        return f"feature encoder, layer {match[1]}"
    if name in ("feature_norm", "feature_projection"):
        return "feature projection"
    if name == "transformer.positional":
        return "positional convolution"
    if re.fullmatch(r"transformer\.blocks\.\d+(\.attention|\.feed_forward)?", name):
        part = {"attention": "attention", "feed_forward": "feed-forward"}.get(name.rpartition(".")[2])
        return f"blocks: {part or 'norms, dropout, sums'}"
    return None


def _mark(module: nn.Module, label: str) -> None:
    forward = module.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return forward(*args, **kwargs)

    module.forward = marked


def by_module(events: Iterable[Any]) -> Seconds:
    """Seconds of each module. An operation of the backward has the number of that of the forward which made it."""
    # Without those of a GPU itself: the operations that launched them have their time.
    events = [event for event in events if event.device_type == DeviceType.CPU]
    inside = {id(event): _module_around(event) for event in events}
    made: dict[int, str] = {}
    for event in events:
        module = inside[id(event)]
        if module is not None and event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            made[event.sequence_nr] = module  # the innermost comes last
    found: Seconds = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in events:
        node = _node_around(event)
        module = inside[id(event)] if node is None else made.get(node.sequence_nr, LOSS)
        if module is not None:
            found[module]["forward" if node is None else "backward"] += _own_seconds(event)
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def by_kernel(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each kind of operation, the longest first."""
    found: dict[str, float] = defaultdict(float)
    computing = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU
    for event in events:
        if event.device_type == computing and not event.name.startswith(MARK) and not event.is_user_annotation:
            found[event.name] += _own_seconds(event)
    return dict(sorted(((name, time) for name, time in found.items() if time > 0), key=lambda item: -item[1]))


def _own_seconds(event: Any) -> float:
    """Without what it called; on a GPU, of the kernels that it launched."""
    if torch.cuda.is_available():
        return float(event.self_device_time_total) / 1e6
    return float(event.self_cpu_time_total) / 1e6


def _module_around(event: Any) -> str | None:
    """The innermost module that an event is in, or is."""
    while event is not None:
        if event.name.startswith(MARK):
            return str(event.name.removeprefix(MARK))
        event = event.cpu_parent
    return None


def _node_around(event: Any) -> Any:
    """The backward's operation that an event is part of; None if it is part of none."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def print_tables(modules: Seconds, kernels: dict[str, float]) -> None:
    """Seconds and shares."""
    total = sum(sum(times.values()) for times in modules.values())
    table = Table(title="by module", box=None, header_style="bold", title_justify="left")
    for heading in ("", "forward, s", "backward, s", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in modules.items():
        share = f"{sum(times.values()) / total:.1%}"
        table.add_row(name, f"{times['forward']:.3f}", f"{times['backward']:.3f}", share)
    console.print(table)
    table = Table(title="by kernel", box=None, header_style="bold", title_justify="left")
    for heading in ("", "s", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, time in list(kernels.items())[:KERNELS]:
        table.add_row(name, f"{time:.3f}", f"{time / total:.1%}")
    console.print(table)


def draw(modules: Seconds, kernels: dict[str, float], path: Path, *, title: str) -> None:
    """Two bar charts above each other."""
    shown = dict(list(kernels.items())[:KERNELS])
    heights = [len(modules), len(shown)]
    figure = new_figure(width=9, height=1.5 + 0.28 * sum(heights))
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    names = list(modules)
    forward, backward = ([modules[name][way] for name in names] for way in ("forward", "backward"))
    upper.barh(names, forward, label="forward", color="#4878a8")
    upper.barh(names, backward, left=forward, label="backward", color="#e08a4f")
    upper.legend(frameon=False)
    upper.set_title(title)
    lower.barh(list(shown), list(shown.values()), color="#6a9f6a")
    lower.set_xlabel("seconds")
    for axes in (upper, lower):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
