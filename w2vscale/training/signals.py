"""Stopping cleanly: SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the loop to finish its update, save and leave."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from w2vscale.data.loading import STOP_SIGNALS

ONE_REQUEST = 2.0
"""Seconds in which signals are one request: a scheduler may signal a launcher, which passes it on, and its ranks."""


class StopRequest:
    """While active, remembers the first stop signal; a later second one ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at > ONE_REQUEST:
            raise KeyboardInterrupt
