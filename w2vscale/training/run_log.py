"""What a run says about itself: `logs/train.log`, for people, and `logs/events.jsonl`, for programs."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from w2vscale.checkpoint.format import committed, update_of
from w2vscale.distributed.ranks import ALONE, ON_ALL_RANKS, Ranks
from w2vscale.errors import UserError
from w2vscale.files import append_records, regular

Event = Literal["start", "health", "warning", "roll_back", "stop"]
LOG = "train.log"
EVENTS = "events.jsonl"


class RunLog:
    """The logs of a run in its folder. Every line has a time, and a rank and host if the run has several processes.

    Both files only grow: what a run did before it was killed stays. Until `open`, both are kept in memory. A log that
    cannot be written does not end a run.
    """

    def __init__(self, exp: Path, ranks: Ranks = ALONE) -> None:
        self._folder = exp / "logs"
        self._source = f"[rank {ranks.rank} on {socket.gethostname()}] " if ranks.world_size > 1 else ""
        self._main = ranks.is_main
        self.update = 0  # the newest one that is complete, and so that of an event
        self._early: list[str] | None = []
        self._early_events: list[dict[str, object]] = []

    def open(self) -> None:
        """Write what has been kept in memory, unless the run has no folder yet: a refused run does not make one.

        Call it when the process may write to the folder.
        """
        if self._early is not None and self._folder.is_dir():
            with suppress(OSError, UserError):
                newest = committed(self._folder.parent / "checkpoints")[-1:]
                self.update = self.update or max(map(update_of, newest), default=0)
            early, self._early = self._early, None
            self._append(early)
            self._append_events([{**event, "update": self.update} for event in self._early_events])

    def line(self, text: str) -> None:
        """Append a text, with the time before each of its lines."""
        time = now()
        lines = [f"{time} {self._source}{line}\n" for line in text.splitlines()]
        if self._early is None:
            self._append(lines)
        else:
            self._early += lines

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Write any error of the block; one that all ranks raise, only on rank 0."""
        try:
            yield
        except UserError as error:
            if self._main or ON_ALL_RANKS not in getattr(error, "__notes__", ()):
                self.line(f"error: {error}")
            self._stopped(str(error))
            raise
        except Exception as error:
            self.line("".join(traceback.format_exception(error)))
            self._stopped(traceback.format_exception_only(error)[-1].strip())
            raise
        except KeyboardInterrupt:
            self.line("interrupted")
            self._stopped("interrupted")
            raise

    def event(self, name: Event, **values: object) -> None:
        """Append an event at the newest update to `logs/events.jsonl`."""
        event = {"event": name, "time": now(), "update": self.update, **values}
        if self._early is None:
            self._append_events([event])
        else:
            self._early_events.append(event)

    def _stopped(self, text: str) -> None:
        if self._main:
            self.event("stop", text=text)

    def _append_events(self, events: list[dict[str, object]]) -> None:
        with suppress(UserError):
            append_records(self._folder / EVENTS, events)

    def _append(self, lines: list[str]) -> None:
        # One write, because several processes may append to the file.
        with suppress(OSError), open(self._folder / LOG, "ab", opener=regular, buffering=0) as file:
            file.write("".join(lines).encode(errors="backslashreplace"))


def now() -> str:
    """The time in UTC, to seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
