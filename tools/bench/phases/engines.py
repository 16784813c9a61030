"""Whether all engines compute the same on this device, and where an update synchronises with the GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.bench.contenders import Work
from tools.bench.engine_parity import ENGINES, relative_difference
from tools.bench.phases.measuring import Machine, Rows, process_context
from tools.bench.running import Setup, build
from w2vscale import runtime
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import Ranks, process_group
from w2vscale.engine.deepspeed.config import import_deepspeed
from w2vscale.objectives import StepContext
from w2vscale.objectives.contrastive import Contrastive, ContrastiveInputs

UPDATES, SAVED = 6, 3
"""Updates of each run, and the one after which it saves a checkpoint for another engine to resume."""

QUIET = (
    *(f"regularization.{name}=0" for name in ("dropout", "attention_dropout", "input_dropout")),
    "objective.feature_dropout=0",
)
"""Without noise that the CPU and a GPU draw differently."""

PRECISIONS = ("fp32", "bf16")

AGREE = {"fp32": {"losses": 1e-5, "norms": 1e-5}, "bf16": {"losses": 5e-3, "norms": 0.15}}
"""Largest relative differences from DDP that count as agreement. In bf16 a code of these few frames may flip."""

AGREE_GRADIENTS = {"fp32": 1e-2, "bf16": 0.25}
"""The same of the first update's gradients, from those in fp32 on the CPU. In bf16 `base` is 0.15 away there; a single
wrong operation changes far more than the loss shows."""

AGREE_GRADIENTS_TINY = {"fp32": 1e-5, "bf16": 0.1}
"""Of the tiny model, which is 0.03 away in bf16."""

AGREE_WITH_CPU = {"losses": 1e-4, "norms": 1e-3}

WAIT = 80.0
"""Seconds that an engine waits for the checkpoint of the one before it."""


def correctness(machine: Machine) -> Rows:
    """Losses and norms of every engine, in fp32 and bf16, against DDP's and against DDP on the CPU in fp32.

    All start alike. After `SAVED` updates each saves a checkpoint, and each continues that of the engine before it.
    """
    context = process_context(machine)
    if not machine.on_gpu:  # slow imports, once before the forks
        import_deepspeed(torch.device("cpu"))
        for module in (
            "torch._dynamo",
            "w2vscale.engine.fsdp",
            "w2vscale.engine.ddp",
            "w2vscale.engine.deepspeed.engine",
        ):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = list(ENGINES)
        runs = {
            (engine, precision): (machine.device_name, engine, names[index - 1], precision)
            for precision in PRECISIONS
            for index, engine in enumerate(names)
        }
        if machine.on_gpu:
            runs["ddp", "cpu"] = ("cpu", "ddp", "", "fp32")
            runs |= {
                ("ddp_compiled", precision): (machine.device_name, "ddp_compiled", "", precision)
                for precision in PRECISIONS
            }
        processes = []
        for (engine, precision), arguments in runs.items():
            result = folder / f"{engine}-{precision}.json"
            process = context.Process(target=_train, args=(*arguments, machine.tiny, folder, result))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        gradients = gradient_differences(folder, machine)
        curves = {
            run: json.loads(path.read_text()) for run in runs if (path := folder / f"{run[0]}-{run[1]}.json").is_file()
        }
    for (engine, precision), curve in curves.items():
        yield f"{engine}_{precision}", curve
    differences, agree = compare(curves, gradients, tiny=machine.tiny)
    missing = [run for run in runs if run not in curves]
    yield "max_relative_difference", differences
    yield "engines_agree", agree and not any(engine in ENGINES for engine, _ in missing)
    if missing:
        named = ", ".join(f"{engine} in {precision}" for engine, precision in missing)
        raise RuntimeError(f"no result of {named}; see this phase's log")


Curves = Mapping[tuple[str, str], Mapping[str, list[float]]]
"""Losses and norms by engine and precision; ("ddp", "cpu") is DDP in fp32 on the CPU."""


def compare(curves: Curves, gradients: Mapping[str, float], *, tiny: bool) -> tuple[dict[str, float], bool]:
    """The largest relative differences from DDP, and whether all are within their limits.

    Compiled DDP has no limit, because it adds up in another order.
    """
    differences: dict[str, float] = {}
    agree = True
    for precision in PRECISIONS:
        if ("ddp", precision) not in curves:
            continue
        reference = curves["ddp", precision]
        of_engines = [curve for (engine, other), curve in curves.items() if other == precision and engine in ENGINES]
        compiled = curves.get(("ddp_compiled", precision))
        for figure, limit in AGREE[precision].items():
            from_start = [relative_difference(curve[figure], reference[figure]) for curve in of_engines]
            continued = [
                relative_difference(curve[f"continued_{figure}"], reference[figure][SAVED:]) for curve in of_engines
            ]
            differences[f"{precision}_{figure}"] = max(from_start)
            differences[f"{precision}_continued_{figure}"] = max(continued)
            agree &= max(from_start + continued) <= limit
            if compiled is not None:
                differences[f"{precision}_compiled_{figure}"] = relative_difference(compiled[figure], reference[figure])
    for precision, difference in gradients.items():
        differences[f"{precision}_gradients"] = difference
        agree &= difference <= (AGREE_GRADIENTS_TINY if tiny else AGREE_GRADIENTS)[precision]
    if ("ddp", "cpu") in curves and ("ddp", "fp32") in curves:
        for figure, limit in AGREE_WITH_CPU.items():
            difference = relative_difference(curves["ddp", "fp32"][figure], curves["ddp", "cpu"][figure])
            differences[f"cpu_{figure}"] = difference
            agree &= difference <= limit
    return differences, agree


def gradient_differences(folder: Path, machine: Machine) -> dict[str, float]:
    """‖g - r‖ / ‖r‖ of the first update's gradients of all parameters, r those in fp32 on the CPU."""
    files = {precision: folder / f"gradients-{precision}-{machine.device.type}.safetensors" for precision in PRECISIONS}
    exact = folder / "gradients-fp32-cpu.safetensors"
    if not exact.is_file():
        return {}
    expected = load_file(exact)
    length = sum(float(x.square().sum()) for x in expected.values())
    found = {}
    for precision, file in files.items():
        if file.is_file():
            gradients = load_file(file)
            missing = {name: torch.zeros_like(x) for name, x in expected.items() if name not in gradients}
            away = sum(float((x - expected[name]).square().sum()) for name, x in (gradients | missing).items())
            found[precision] = math.sqrt(away / length)
    return found


def _train(device_name: str, engine: str, before: str, precision: str, tiny: bool, folder: Path, result: Path) -> None:
    """In a process of its own: `UPDATES` updates, then those after `SAVED` again from the checkpoint of `before`."""
    runtime.end_with_parent()
    try:
        if device_name == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU also where there is a GPU
            torch.set_num_threads(1 if tiny else 4)
        name, compiled = engine.removesuffix("_compiled"), engine.endswith("_compiled")
        settings = [
            *QUIET,
            "model.layers=2",
            f"precision.compute={precision}",
            ENGINES[name],
            f"engine.compile={compiled}",
        ]
        config = Machine(device_name, tiny).config("base", *settings)
        with process_group(needed=True) as (ranks, device):
            found = _curves(config, device, ranks, folder, (engine, before, precision), tiny=tiny)
        result.with_suffix(".partial").write_text(json.dumps(found))
        result.with_suffix(".partial").rename(result)
    except Exception:  # the phase reports the run that has no result
        print(f"{engine} in {precision} on {device_name}:")
        traceback.print_exc()


def _curves(
    config: Config, device: torch.device, ranks: Ranks, folder: Path, run: tuple[str, str, str], *, tiny: bool
) -> dict[str, list[float]]:
    engine_name, before, precision = run
    batches = [_padded_batch(config, number, tiny=tiny) for number in range(2 * UPDATES)]
    setup = _build(config, device)
    saved = folder / f"{engine_name}-{precision}-{device.type}"
    gradients = folder / f"gradients-{precision}-{device.type}.safetensors" if engine_name == "ddp" else None
    losses, norms = _updates(setup, batches, range(SAVED), gradients)
    store = CheckpointStore(saved, ranks, expected=expected_of(config))
    store.save(setup.engine.export_state(), TrainState(update=SAVED), dump_config(config))
    more_losses, more_norms = _updates(setup, batches, range(SAVED, UPDATES))
    setup.engine.close()
    curves = {"losses": losses + more_losses, "norms": norms + more_norms}
    if before:
        other = folder / f"{before}-{precision}-{device.type}" / f"update_{SAVED:08d}"
        deadline = time.monotonic() + WAIT
        while not other.is_dir():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{before} saved no checkpoint in {WAIT:.0f} s")
            time.sleep(0.05)
        setup = _build(config, device)
        setup.engine.import_state(open_checkpoint(other))
        curves["continued_losses"], curves["continued_norms"] = _updates(setup, batches, range(SAVED, UPDATES))
        setup.engine.close()
    return curves


def _build(config: Config, device: torch.device) -> Setup:
    setup = build(config, device)
    one = setup.objective
    setup.objective = _HostNoise(one.settings, one.model, one.regularization, one.compute_dtype)
    return setup


class _HostNoise(Contrastive):
    """The objective with Gumbel noise drawn on the CPU, so that it is the same on every device."""

    def _gumbel_noise(self, inputs: ContrastiveInputs, step: StepContext) -> Tensor:
        on_host = inputs._replace(frame_M=inputs.frame_M.cpu())
        return super()._gumbel_noise(on_host, step).to(inputs.frame_M.device)


def _updates(
    setup: Setup, batches: Sequence[MicroBatch], numbers: range, gradients: Path | None = None
) -> tuple[list[float], list[float]]:
    """Losses per masked frame, and norms, of updates of two micro-batches each; the first update's gradients, in a
    file."""
    losses, norms = [], []
    for number in numbers:
        window = batches[2 * number : 2 * number + 2]
        weight = sum(batch.weight for batch in window)
        sums = setup.window(window, float(weight), update=number)
        if number == 0 and gradients is not None:
            engine: Any = setup.engine
            save_file({name: x.grad.cpu() for name, x in engine.parameters.items() if x.grad is not None}, gradients)
        norms.append(float(setup.step(1e-4)))
        losses.append(float(sums.total) / weight)
    assert all(map(math.isfinite, losses + norms))
    return losses, norms


def _padded_batch(config: Config, number: int, *, tiny: bool) -> MicroBatch:
    """Utterances of different lengths, so that padding counts."""
    work = Work(config, 2, 0.6 if tiny else 5.0, "corpus")
    return work.batch(number)


def synchronisations(machine: Machine) -> Rows:
    """Operations of one update of DDP that the host waits for, with the places that ask for them.

    An update is a window and a step; what the training loop compares and adds up over ranks goes over the CPU.
    """
    for form in ("eager", "compiled"):
        if not machine.on_gpu:  # a CPU waits for nothing
            yield from ((f"{form}/places", None), (f"{form}/syncs_per_update", None))
            continue
        places = _places(
            machine, machine.config("base", "precision.compute=bf16", f"engine.compile={form == 'compiled'}")
        )
        yield f"{form}/places", places
        yield f"{form}/syncs_per_update", sum(map(len, places.values()))


def _places(machine: Machine, config: Config) -> dict[str, list[str]]:
    setup = build(config, machine.device)
    work = Work(config, 2, 2.0 if machine.tiny else 15.0, "bucket")
    window = [work.batch(number).pin_memory() for number in range(2)]
    denominator = float(sum(batch.weight for batch in window))
    for _ in range(2):
        setup.window(window, denominator)
        setup.step(1e-4)
    found = {}
    with _waits() as places:
        setup.window(window, denominator)
    found["window"] = list(places)
    with _waits() as places:
        setup.step(1e-4)
    found["step"] = list(places)
    return found


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects the places in our code that make the host wait for the GPU, as CUDA's check reports them."""
    places: list[str] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            stack = [frame for frame in traceback.extract_stack() if "w2vscale/" in frame.filename]
            at = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in stack[-3:]]
            places.append(" > ".join(at) or "in the backward")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
