"""The end of a run with `checkpoint.store`: the last checkpoint is uploaded, or the time for that is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from w2vscale.checkpoint.mirror import Mirror
from w2vscale.distributed.process_group import broadcast_from_main, largest_over_ranks
from w2vscale.runtime import StopRequest
from w2vscale.training.time_limit import TimeLimit

POLL = 1.0  # seconds between looks at the clock
LAST_UPLOAD = 300.0  # seconds for which a failing upload is tried again


def finish_uploads(
    mirror: Mirror | None, stop: StopRequest, limit: TimeLimit, *, grace: float, note: Callable[[], None]
) -> bool:
    """Wait until the last checkpoint is uploaded, or cannot be. Return whether it is in the store. Collective.

    `mirror` is on rank 0. An upload that fails is tried again for LAST_UPLOAD seconds; after a stop signal, only for
    the `grace` time, and never longer than the limit. `note` is called all the time, for the watchdog.
    """
    began = time.monotonic()
    if mirror is not None:
        mirror.hurry()
    while True:
        note()
        arrived = stop.arrived()
        end = math.inf if arrived is None else arrived[1] + grace - min(10.0, 0.4 * grace)
        end = min(end, limit.deadline)
        over = mirror is not None and mirror.wait(min(POLL, max(end - time.monotonic(), 0.0)))
        if mirror is not None and mirror.failing and time.monotonic() - began > LAST_UPLOAD:
            over = True
        late = time.monotonic() >= end
        if largest_over_ranks([over or late])[0]:
            # If it is not there, the mirror says so when it is closed, in the last line of the run.
            return broadcast_from_main(mirror is None or mirror.complete)
