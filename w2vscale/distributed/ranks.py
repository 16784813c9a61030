"""Which process of a run this is. Does not import PyTorch, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

ON_ALL_RANKS = "This error is raised on all ranks."
"""A note on errors."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, its rank on this machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs and commits checkpoints."""
        return self.rank == 0


ALONE = Ranks()
