"""Bytes that each rank sends in one update of an engine, counted at its collectives. Part of gradient_reduction.py.

    torchrun --standalone --nproc-per-node 2 tools/bench/sent_bytes.py RESULT.json engine.name=fsdp

`tiny` takes two updates of two forwards; the second is counted. Every collective is seen where PyTorch dispatches it,
with its tensors and its group. What a rank sends for it is that of a ring (Patarasuk and Yuan 2009): with W ranks and a
whole tensor of N bytes, 2 (W - 1) / W N for an all-reduce, and half of it for a reduce-scatter or an all-gather.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench.engine_memory import micro_batch
from tools.bench.running import build
from tools.bench.script import run_script
from w2vscale.config import load_config
from w2vscale.distributed.process_group import process_group
from w2vscale.engine.deepspeed.config import import_deepspeed
from w2vscale.objectives.base import empty_model

SMALL = 64  # bytes

SHARES = {"allreduce": 2.0, "reduce_scatter": 1.0, "allgather": 1.0, "broadcast": 1.0, "reduce": 1.0}
"""What a ring sends of a whole tensor, times W / (W - 1); of several names that fit, the longest counts."""


KINDS = {"gradients": ("allreduce", "reduce_scatter", "reduce"), "parameters": ("allgather", "broadcast")}
"""The collectives that carry each kind of tensor. DDP sends no parameters."""


class Collective(NamedTuple):
    """One call of a collective: the name of its operator, the bytes of its whole tensor, and the ranks of its group."""

    name: str
    whole: int
    ranks: int

    @property
    def kind(self) -> str | None:
        """Its key in `SHARES`, or None."""
        return max((kind for kind in SHARES if self.name.strip("_").startswith(kind)), key=len, default=None)

    @property
    def sent(self) -> float:
        """The bytes that each rank sends for it."""
        return SHARES[self.kind] * self.whole * (self.ranks - 1) / self.ranks if self.kind else 0.0


class Collectives(TorchDispatchMode):
    """Keeps every collective that PyTorch dispatches on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            # The whole tensor is the larger of what goes in and comes out.
            whole = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)
            objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            group = next(found for found in objects if "ProcessGroup" in str(found._type()))
            name = function._schema.name.partition("::")[2]
            self.found.append(Collective(name, whole, dist.ProcessGroup.unbox(group).size()))
        return function(*args, **(kwargs or {}))


def sent_by_kind(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes of gradients and of parameters that a rank sends. Small collectives do not count: norms and counts."""
    large = [one for one in found if one.whole >= SMALL]
    return {kind: round(sum(one.sent for one in large if one.kind in names)) for kind, names in KINDS.items()}


def main(result: Path, settings: Annotated[list[str], typer.Argument(metavar="SECTION.KEY=VALUE...")]) -> None:
    """Count the second update; rank 0 writes RESULT."""
    config = load_config("tiny", ["data.max_seconds=2.5", "batch.max_seconds=2.5", *settings])
    with process_group(needed=True) as (ranks, device):
        if config.engine.name == "deepspeed":
            import_deepspeed(device)
        setup = build(config, device)
        for update in range(2):
            batches = [micro_batch(config, number=4 * update + 2 * ranks.rank + index) for index in range(2)]
            collectives = Collectives()
            with collectives:
                setup.window(batches, float(sum(batch.weight for batch in batches)) * ranks.world_size, update=update)
                setup.step(1e-4)
        count = sum(parameter.numel() for parameter in empty_model(setup.objective).parameters())
        if ranks.is_main:
            result.write_text(json.dumps({"count": count, **sent_by_kind(collectives.found)}))
        setup.engine.close()


if __name__ == "__main__":
    run_script(main)
