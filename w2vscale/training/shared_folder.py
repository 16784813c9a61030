"""Whether all hosts of a run see the same run folder. Otherwise the run would fail at its first checkpoint."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from w2vscale.distributed.process_group import Ranks, broadcast_from_main, gather_from_ranks
from w2vscale.errors import UserError
from w2vscale.files import regular

VISIBLE = 10.0  # seconds until a file is visible on all hosts of a shared file system
LOOK = 0.2  # seconds between two looks
LONGEST = 2**16  # bytes of a lock


def require_shared(exp: Path, ranks: Ranks) -> None:
    """Raise a UserError on every rank if a host does not see the folder that rank 0 has locked. Collective.

    The first rank of each host looks for the lock with its content, for as long as NFS may show an older one.
    """
    lock = exp / "lock"
    expected = broadcast_from_main(_content(lock) if ranks.is_main else None)
    seen = ranks.is_main or ranks.local_rank > 0
    deadline = time.monotonic() + VISIBLE
    while not seen:
        seen = _content(lock) == expected
        if not seen and time.monotonic() > deadline:
            break
        time.sleep(0.0 if seen else LOOK)
    hosts = gather_from_ranks((socket.gethostname(), seen))
    if blind := dict.fromkeys(host for host, sees in hosts if not sees):
        raise UserError(
            f"{exp}: the folder of the run on {hosts[0][0]} (rank 0) is not the one on {', '.join(blind)}; choose an "
            "--exp on a disk that all hosts share"
        )


def _content(path: Path) -> bytes | None:
    with suppress(OSError), open(path, "rb", opener=regular) as file:
        return file.read(LONGEST)
    return None
