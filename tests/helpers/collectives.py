"""What a process sends: every collective of PyTorch's process groups, by kind and size."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

from tests.helpers.engines import set_up
from tools.bench.contenders import Work
from tools.bench.sent_bytes import Collectives
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


def sent_in_an_update(config: Config, forwards: int) -> list[Sent]:
    """What this rank sends in an update, from the third on: then DeepSpeed knows the order of the modules."""
    rank, size = dist.get_rank(), dist.get_world_size()
    setup = set_up(config)
    work = Work(config, 1, 1.0)
    window = [work.batch(rank + size * number) for number in range(forwards)]
    for update in range(3):
        collectives = Collectives()
        with collectives:
            setup.window(window, 100.0, update=update)
            setup.step(1e-4, update=update)
    setup.engine.close()
    return [Sent(KINDS.get(one.name, one.name), one.whole) for one in collectives.found]
