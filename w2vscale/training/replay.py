"""Keep the windows whose gradient was not finite, with the weights, and run them again to find the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from typing_extensions import TypedDict

from w2vscale.checkpoint.format import FOLDER as CHECKPOINT
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import dump_config
from w2vscale.data.inputs import join, leaves_of, with_leaves
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.randomness import Stream, generator
from w2vscale.distributed.process_group import errors_on_all_ranks, gather_from_ranks
from w2vscale.engine.accumulation import split
from w2vscale.errors import UserError, counted, refused_value
from w2vscale.files import nearest_path, new_file
from w2vscale.kernels.replaceable import kernels
from w2vscale.objectives import Objective, StepContext, load
from w2vscale.optim.canonical import model_only, specs_of
from w2vscale.training.run import Run

FOLDER = "nonfinite"  # in the run folder
NAME = re.compile(r"window_(\d{8,})_rank_(\d+)\.safetensors")
KEPT = 8  # ranks that keep their windows if the losses do not show which rank had the values


class _About(TypedDict):
    """What the header of the file of a window holds besides tensors."""

    update: Annotated[int, Field(ge=0, lt=2**40)]
    numbers: Annotated[list[Annotated[int, Field(ge=0, lt=2**62)]], Field(min_length=1)]
    per_forward: Annotated[int, Field(ge=1)]
    denominator: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    checkpoint: Annotated[str, Field(pattern=f"^{CHECKPOINT.pattern}$")]
    others: dict[str, list[Any]]


_ABOUT = TypeAdapter(_About)


class Window(NamedTuple):
    """The micro-batches of a rank in one update, and what else its gradient depends on."""

    micro_batches: Sequence[MicroBatch]
    update: int  # from 0
    per_forward: int
    denominator: float


def keep_window(run: Run, window: Window, *, finite: bool) -> Path:
    """Write the weights, and the windows of the ranks whose losses are not `finite`. Collective.

    If all losses are finite, the windows of the first ranks are written. Returns the file of the only window, or the
    folder of all, for `replay`. Raises UserError on all ranks if the weights are not finite, or something cannot be
    written.
    """
    store = CheckpointStore(run.exp / FOLDER, run.ranks, expected=model_only(run.store.expected))
    state = {name: tensor for name, tensor in run.engine.export_state().items() if name.startswith("model.")}
    checkpoint = store.save(state, replace(run.state, update=window.update), dump_config(run.config))
    guilty = [rank for rank, good in enumerate(gather_from_ranks(finite)) if not good] or range(run.ranks.world_size)
    file = checkpoint.parent / f"window_{window.update:08d}_rank_{run.ranks.rank}.safetensors"
    with errors_on_all_ranks():
        if run.ranks.rank in guilty[:KEPT]:
            write_window(file, window, checkpoint.name)
    return gather_from_ranks(file)[guilty[0]] if len(guilty) == 1 else file.parent


def write_window(file: Path, window: Window, checkpoint: str) -> None:
    """Write a window; `checkpoint` is the name of the checkpoint beside it. UserError if it cannot be written."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for place, batch in enumerate(window.micro_batches):
        for name, value in leaves_of(batch.inputs, str(place)):
            (tensors if isinstance(value, Tensor) else others)[name] = value
    about: _About = {
        "update": window.update,
        "numbers": [batch.number for batch in window.micro_batches],
        "per_forward": window.per_forward,
        "denominator": window.denominator,
        "checkpoint": checkpoint,
        "others": others,
    }
    with new_file(file, "wb") as opened:
        write_safetensors(opened, specs_of(tensors), tensors.values(), {"window": json.dumps(about)})


def kept_windows(path: Path) -> list[Path]:
    """The file of a window itself, or those in a folder that are of its last update, by rank. UserError if none."""
    if not path.is_dir():
        return [path]
    found = [(int(match[1]), int(match[2]), file) for file in path.iterdir() if (match := NAME.fullmatch(file.name))]
    if not found:
        raise UserError(f"{path}: holds no windows that a run has kept")
    last = max(update for update, _, _ in found)
    return [file for update, _, file in sorted(found) if update == last]


def read_window(file: Path, objective: Callable[[Path], Objective]) -> tuple[Window, Path]:
    """Read a window and the path of its checkpoint, whose objective the function returns. UserError if it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = _ABOUT.validate_json((opened.metadata() or {})["window"])
            checkpoint = file.parent / about["checkpoint"]
            template = objective(checkpoint).make_inputs([], rng=lambda place: generator(0, Stream.MASK, 0, place))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        leaves = {name: tuple(values) for name, values in about["others"].items()} | tensors
        batches = [
            MicroBatch(number, with_leaves(template, leaves, str(place)), 0)
            for place, number in enumerate(about["numbers"])
        ]
        window = Window(batches, about["update"], about["per_forward"], about["denominator"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = refused_value(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{file}: not a window that a run has kept ({reason}){nearest_path(file)}") from None
    return window, checkpoint


@dataclass(frozen=True)
class Replayed:
    """What was found in a window."""

    update: int  # from 1, as in the log
    micro_batches: tuple[int, ...]  # of the forward that has the problem, or of the window
    problem: str | None  # None: everything is finite here


def replay(file: Path, overrides: Sequence[str] = ()) -> Replayed:
    """Run the forwards and backwards of a window again on the CPU, with plain operations instead of kernels.

    `overrides` replace settings (SECTION.KEY=VALUE). The first problem in the order of computation is reported: a
    module whose output is not finite, one for whose output the gradient is not finite, or the norm of the gradient.
    Raises UserError if the window or its checkpoint cannot be read, or they do not fit.
    """
    window, checkpoint = read_window(file, lambda path: load(open_checkpoint(path).path, overrides)[1])
    opened = open_checkpoint(checkpoint)
    config, objective = load(opened.path, overrides)
    model = opened.build_model(objective)
    model.train()
    watch = _Watch(model)
    step = StepContext(config.trainer.seed, window.update)
    with kernels("plain"):
        for group in split(window.micro_batches, window.per_forward):
            numbers = tuple(batch.number for batch in group)
            context = replace(step, numbers=numbers)
            try:
                inputs = join([batch.inputs for batch in group])
                sums = objective.forward(model, inputs, step=context, training=True)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of PyTorch, for sizes that do not fit
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise UserError(f"{file}: not a window of the model in {opened.path} ({reason})") from error
            if watch.problem is None:
                (sums.total / window.denominator).backward()
            if watch.problem is not None:
                return Replayed(window.update + 1, numbers, watch.problem)
    everything = tuple(batch.number for batch in window.micro_batches)
    return Replayed(window.update + 1, everything, _gradient_problem(model))


class _Watch:
    """Notes the first module of a model whose output, or the gradient for whose output, is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.problem: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(name or "the model"))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look_back(gradient: Tensor) -> None:
            self._note(f"the gradient for the output of {name}", gradient)

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _floating(output):
                self._note(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        return look

    def _note(self, what: str, tensor: Tensor) -> None:
        if self.problem is None and (bad := tensor.numel() - int(tensor.isfinite().sum())):
            self.problem = f"{what} is not finite ({bad:,} of {tensor.numel():,} values)"


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _floating(each)


def _gradient_problem(model: nn.Module) -> str | None:
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the gradient of {name} is not finite"
    if nn.utils.get_total_norm(gradients.values()).isfinite():
        return None
    largest, name = max((float(gradient.abs().max()), name) for name, gradient in gradients.items())
    return f"the norm of the gradient is not finite; the largest value, {largest:.2e}, is in {name}"


def describe(found: Replayed) -> str:
    """One line for the terminal."""
    numbers = found.micro_batches
    where = f"update {found.update}, {counted(len(numbers), 'micro-batch')} from {numbers[0]}"
    return f"{where}: {found.problem or 'everything is finite here'}"
