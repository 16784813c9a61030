"""Opening a checkpoint on all ranks, which share the work of comparing its files with their checksums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from w2vscale.checkpoint.format import STATE, damages
from w2vscale.checkpoint.reader import CheckpointReader, candidates
from w2vscale.distributed.process_group import (
    Patience,
    broadcast_from_main,
    errors_on_all_ranks,
    gather_from_ranks,
)
from w2vscale.errors import UserError


def open_on_all_ranks(path: Path, log: Callable[[str], None] = lambda text: None) -> CheckpointReader:
    """Like `open_checkpoint`, but rank 0 finds the checkpoint, and each file is hashed by one rank. Collective.

    `path` may differ between ranks if it is a checkpoint that each has on its own machine.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    found = candidates(path, log)
    damaged: str | None = None
    while True:
        checkpoint: CheckpointReader | None = None
        with errors_on_all_ranks():
            if is_main:
                checkpoint = found.throw(UserError(damaged)) if damaged else next(found, None)
                checkpoint = checkpoint or CheckpointReader(path)
        checkpoint = broadcast_from_main(checkpoint)
        with errors_on_all_ranks():
            if not is_main and (path / STATE).is_file():  # the one on its own machine
                checkpoint = CheckpointReader(path)
        assert checkpoint is not None
        damaged = damage_on_any_rank(checkpoint)
        if damaged is None:
            return checkpoint


def damage_on_any_rank(checkpoint: CheckpointReader, patience: Patience | None = None) -> str | None:
    """What is wrong with a file of a checkpoint, judging by its checksum; None if all are intact. Collective.

    Each file is hashed by one rank: with the ranks that wrote the checkpoint, each reads its own. The others may wait
    longer than the timeout of the process group, such as for the only file of an imported model.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = [*checkpoint.tensor_files][rank::world_size]
    found = damages(checkpoint.path, {name: checkpoint.files[name] for name in names})
    own = (patience or Patience()).run(lambda: next(found, None))
    return next(filter(None, gather_from_ranks(own)), None)
