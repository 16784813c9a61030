"""Whether all hosts of a run see the same run folder. Otherwise the run would fail at its first checkpoint."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from w2vscale.checkpoint.lock import LONGEST, Lock
from w2vscale.distributed.process_group import Ranks, broadcast_from_main, gather_from_ranks
from w2vscale.errors import UserError
from w2vscale.files import regular

VISIBLE = 10.0  # seconds until a file is visible on all hosts of a shared file system
LOOK = 0.2  # seconds between two looks


def require_shared(exp: Path, ranks: Ranks, lock: Lock | None) -> None:
    """Raise a UserError on every rank if a host does not see the folder that rank 0 has locked. Collective.

    `lock`: that of rank 0.
    """
    first, blind = hosts_that_do_not_see(exp / "lock", lock.content() if lock is not None else None, ranks)
    if blind:
        raise UserError(
            f"{exp}: the folder of the run on {first} (rank 0) is not the one on {', '.join(blind)}; choose an "
            "--exp on a disk that all hosts share"
        )


def hosts_that_do_not_see(path: Path, content: bytes | None, ranks: Ranks) -> tuple[str, list[str]]:
    """Return the host of rank 0, and those that do not see the file that it has written there. Collective.

    `content`: that of the file, on rank 0. The first rank of each other host looks for it, for as long as NFS may show
    an older one.
    """
    expected = broadcast_from_main(content)
    seen = ranks.is_main or ranks.local_rank > 0
    deadline = time.monotonic() + VISIBLE
    while not seen:
        seen = _content(path) == expected
        if not seen and time.monotonic() > deadline:
            break
        time.sleep(0.0 if seen else LOOK)
    hosts = gather_from_ranks((socket.gethostname(), seen))
    return hosts[0][0], list(dict.fromkeys(host for host, sees in hosts if not sees))


def _content(path: Path) -> bytes | None:
    with suppress(OSError), open(path, "rb", opener=regular) as file:
        return file.read(LONGEST)
    return None
