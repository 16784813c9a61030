"""`trainer.max_hours`: when a run has to save, so that it has ended within its time."""

from __future__ import annotations

import math
import time

SAVES = 2.0  # time kept for saving, as a multiple of the last save: one in the background may have to end first
UNKNOWN_SAVE = 0.05  # the same before the first save, as a share of the limit; at most `checkpoint.grace_seconds`


class TimeLimit:
    """The time that this process may take since it `began`, by `time.monotonic`; by default now. None: any."""

    def __init__(self, hours: float | None, *, grace: float, began: float | None = None) -> None:
        self.seconds = math.inf if hours is None else 3600 * hours
        self.deadline = (time.monotonic() if began is None else began) + self.seconds
        self._unknown = min(UNKNOWN_SAVE * self.seconds, grace)

    def reached(self, *, save_seconds: float | None, update_seconds: float) -> bool:
        """Whether one more update would not leave the time to save. `save_seconds`: of the last save, None if none."""
        saving = self._unknown if save_seconds is None else SAVES * save_seconds
        another = update_seconds if math.isfinite(update_seconds) else 0.0  # nothing is known before the first one
        return time.monotonic() + saving + another >= self.deadline
