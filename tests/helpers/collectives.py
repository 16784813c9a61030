"""What a process sends: every collective of PyTorch's process groups, by kind and size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.engines import set_up
from tools.bench.contenders import Work
from w2vscale.config import Config

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Sent(NamedTuple):
    """A collective, and the bytes of its largest tensor: what all ranks have of it together."""

    kind: str
    size: int


class Recorder(TorchDispatchMode):
    """Records the collectives that are called in its `with` block; an unknown one under its name in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if operation.namespace == "c10d":
            name = operation.name().partition("::")[2]
            self.sent.append(Sent(KINDS.get(name, name), max(tensor.nbytes for tensor in _tensors(arguments))))
        return operation(*arguments, **(keywords or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def sent_in_an_update(config: Config, forwards: int) -> list[Sent]:
    """What this rank sends in an update, from the third on: then DeepSpeed knows the order of the modules."""
    rank, size = dist.get_rank(), dist.get_world_size()
    setup = set_up(config)
    work = Work(config, 1, 1.0)
    window = [work.batch(rank + size * number) for number in range(forwards)]
    for update in range(3):
        with Recorder() as recorder:
            setup.window(window, 100.0, update=update)
            setup.step(1e-4, update=update)
    setup.engine.close()
    return recorder.sent
