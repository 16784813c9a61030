"""How ranks lie on machines, for sharding within a machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from w2vscale.distributed.launch import local_processes
from w2vscale.distributed.process_group import gather_from_ranks, launch_environment
from w2vscale.errors import UserError


class Place(NamedTuple):
    """Where a rank runs, and how many processes its launcher says there are on a machine."""

    host: str
    local_rank: int
    processes: int | None


def processes_per_node(setting: str) -> int:
    """Return the number of processes on each machine. Collective. `setting` is named in errors: see `node_size`."""
    environment = os.environ | launch_environment(os.environ)
    own = Place(socket.gethostname(), int(environment.get("LOCAL_RANK", "0")), local_processes(environment))
    return node_size(gather_from_ranks(own), setting)


def node_size(places: Sequence[Place], setting: str) -> int:
    """Return the number of ranks on each machine, given the place of every rank.

    Raises UserError if the launcher does not say it, if it differs between machines, or if the ranks of a machine are
    not consecutive.
    """
    if len(places) == 1:
        return 1
    sizes = {place.processes for place in places}
    if None in sizes:
        raise UserError(f"{setting}: the launcher does not say how many processes each machine has; set a number")
    size = places[0].processes or 1
    if len(sizes) > 1 or len(places) % size:
        raise UserError(f"{setting}: the machines have different numbers of processes; set a number that divides all")
    for rank, place in enumerate(places):
        if place.local_rank != rank % size or place.host != places[rank - rank % size].host:
            raise UserError(
                f"{setting}: rank {rank} is process {place.local_rank} of {place.host}: the ranks of a machine must be "
                "consecutive (srun --distribution=block)"
            )
    return size
