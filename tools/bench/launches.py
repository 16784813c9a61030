"""Count the operations of an update that a GPU would run: those on tensors, without views.

    python tools/bench/launches.py
    python tools/bench/launches.py --preset large --utterances 24 --seconds 20

The update is traced on the meta device, where tensors have no values, with the kernels of a GPU. So it needs no GPU,
and whatever needs a value, which the host would have to wait for, fails. An operation is one kernel launch or, for
some, several. torch.compile makes fewer of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.operators import PARTS
from tools.bench.contenders import Work
from tools.bench.script import console, run_script
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import to_device
from w2vscale.data.randomness import Stream
from w2vscale.errors import UserError
from w2vscale.kernels import packed_attention
from w2vscale.kernels.table import KERNELS, Kernel
from w2vscale.models.layers import weights_cast_once
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.base import empty_model

META = torch.device("meta")

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Counts the operations on tensors of the meta device by name, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in PARTS:
            with self:
                return PARTS[function](*args, **(kwargs or {}))
        y = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        views = any(argument.alias_info is not None and not argument.alias_info.is_write
                    for argument in function._schema.arguments)  # fmt: skip
        if not views and name not in NO_LAUNCH and _on_meta(args if y is None else y):
            self.counts[name] += 1
        return y


def _on_meta(values: Any) -> bool:
    return any(isinstance(x, Tensor) and x.device == META for x in tree_leaves(values))


class _Unseeded(StepContext):
    """The context of a forward without generators, which the meta device does not have."""

    def generators(self, stream: Stream, device: torch.device) -> list[Any]:
        return [None] * len(self.numbers)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Use the kernels of a GPU on the meta device."""
    takes_packed = packed_attention.takes_packed
    added = {(operation, "meta"): kernel for (operation, device), kernel in KERNELS.items() if device == "cuda"}
    # A GPU has an operation for dropout; the meta device takes it apart.
    added["dropout", "meta"] = Kernel(lambda *arguments: torch.native_dropout(*arguments)[0])
    KERNELS.update(added)
    packed_attention.takes_packed = lambda q_NHE: True
    try:
        yield
    finally:
        packed_attention.takes_packed = takes_packed
        for key in added:
            del KERNELS[key]


def count(config: Config, utterances: int, seconds: float) -> dict[str, Counter[str]]:
    """Operations by name: once per window, in a forward, and in its backward. Utterances are of one bucket."""
    objective = build_objective(config)
    model = empty_model(objective).to(META).train()
    batch = Work(config, utterances, seconds, "bucket").batch(0)
    inputs = to_device(batch.inputs, META)
    step = _Unseeded(0, 0, (batch.number,))
    with kernels_of_a_gpu(), Operations() as window, weights_cast_once(model, objective.compute_dtype):
        with Operations() as forward:
            total = objective.forward(model, inputs, step=step, training=True).total
        with Operations() as backward:
            total.backward()
    return {
        "window": window.counts - forward.counts - backward.counts,
        "forward": forward.counts,
        "backward": backward.counts,
    }


def main(
    preset: Annotated[str, typer.Option(help="Preset of a pretraining run.")] = "base",
    utterances: Annotated[list[int] | None, typer.Option(min=1, help="Utterances of a forward; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the longest utterance.")] = 15.6,
    most: Annotated[int, typer.Option(min=0, help="Print this many of the most frequent operations.")] = 0,
) -> None:
    """Print the numbers of operations, and JSON as the last line."""
    config = load_config(preset, ["regularization.layerdrop=0", "precision.compute=bf16"])
    if config.objective.name == "ctc":
        raise UserError(f"--preset {preset}: fine-tuning, which needs transcripts; choose a preset of pretraining")
    table = Table(title=f"operations of {preset}", box=None, title_justify="left")
    for heading in ("forward", "per window", "in the forward", "in the backward", "per second of audio"):
        table.add_column(heading, justify="right")
    found = {}
    for size in utterances or [5, 40]:
        counts = count(config, size, seconds)
        totals = {part: of_part.total() for part, of_part in counts.items()}
        per_second = (totals["forward"] + totals["backward"]) / (size * seconds)
        found[f"{size}x{seconds:g}s"] = totals | {"per_second": per_second}
        table.add_row(f"{size} x {seconds:g} s", *(f"{total:,}" for total in totals.values()), f"{per_second:.2f}")
        for part, by_name in counts.items():
            for name, times in by_name.most_common(most):
                console.print(f"{part}: {times} {name}", markup=False)
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
