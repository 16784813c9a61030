"""Logs to a service in a thread of its own: a service that is slow, hangs or fails never holds a run up.

A service gets one row per update, and says which it has already. What an interrupted run has not delivered is read back
from the run folder. So after any number of resumes and failures a service has each row once.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from w2vscale.checkpoint.format import TrainState
from w2vscale.errors import UserError
from w2vscale.loggers.base import Audio, Histogram, Logger, RunFacts
from w2vscale.loggers.identity import Identity, identity, is_undelivered, note_undelivered
from w2vscale.loggers.rows import SPLITS_WITHOUT_CURVES, Row, read_rows

ROWS = 1000  # new ones that wait in memory for a service; later ones are read back from the run folder
RETRY = 60.0  # seconds after a failure until a service is tried again
END_OF_RUN = 60.0  # seconds that a complete run waits for the last rows to be delivered
STOP = 5.0  # seconds that an interrupted one waits: it has to end soon, and delivers the rest when it is resumed


class Service(ABC):
    """One run in a service. Its methods are called by one thread, and may block and raise any exception."""

    setting: str
    """The setting that names the service, for messages."""

    @abstractmethod
    def open(self, who: Identity) -> None:
        """Begin or continue this run, in place of one that is open; find out which rows it has."""

    @abstractmethod
    def has(self, row: Row) -> bool:
        """Whether the open run has a row."""

    @abstractmethod
    def send(self, row: Row) -> None:
        """Add a row to the open run."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """End the open run, if there is one, or interrupt it. Waits until everything is delivered."""

    def abandon(self) -> None:  # noqa: B027 - a process may end with a thread of its own
        """Make sure that the process can end, although a method of this object still runs."""


@dataclass(frozen=True)
class _Begin:
    who: Identity
    rows: list[Row]


@dataclass(frozen=True)
class _End:
    complete: bool


class RemoteLogger(Logger):
    """Collects rows and delivers them to a service.

    The service is opened with the first row, so a run with nothing to log needs no service, unless an earlier process
    has not delivered everything. That is noted in logs/loggers.json before the first row, so a kill does not hide it.
    A failing service gives one warning until it works again, and one at the end if it lacks something.
    """

    def __init__(self, service: Service, facts: RunFacts, warn: Callable[[str], None]) -> None:
        self._service, self._facts, self._warn = service, facts, warn
        self._row: Row | None = None  # not yet complete
        self._begin: _Begin | None = None  # to be sent before the next row
        self._queue: queue.Queue[_Begin | Row | _End] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # for the next three
        self._who: Identity | None = None
        self._committed = -1  # the last update that is complete in the run folder
        self._behind = False  # whether rows up to it are there and not in the queue
        self._complete = self._warned = self._delivered = False
        self._failure = ""  # of the last attempt to deliver everything

    def continue_from(self, state: TrainState) -> None:
        who = identity(self._facts.exp, self._facts.settings, state)
        rows = [row for row in read_rows(self._facts.exp) if row.update <= state.update]
        # A validation of this update may have been interrupted, and belong to the same row.
        self._row = rows.pop() if rows and rows[-1].update == state.update else None
        self._begin = _Begin(who, rows)
        with self._lock:
            self._who, self._committed, self._behind = who, rows[-1].update if rows else -1, False

    def scalars(self, split: str, update: int, values: Mapping[str, float]) -> None:
        if split not in SPLITS_WITHOUT_CURVES:
            self._row_of(update).scalars[split] = dict(values)

    def text(self, name: str, update: int, text: str) -> None:
        self._row_of(update).texts[name] = text

    def image(self, name: str, update: int, png: bytes) -> None:
        self._row_of(update).images[name] = png

    def audio(self, name: str, update: int, audio: Audio) -> None:
        self._row_of(update).audio[name] = audio

    def histogram(self, name: str, update: int, histogram: Histogram) -> None:
        self._row_of(update).histograms[name] = histogram

    def commit(self, update: int) -> None:
        if self._row is not None and self._row.update <= update:
            self._put(self._row)
            self._row = None

    def finish(self) -> None:
        self._complete = True
        if self._thread is not None or is_undelivered(self._facts.exp, self._service.setting):
            self._open()
            if self._row is not None:
                self.commit(self._row.update)

    def close(self) -> None:
        if self._thread is None:
            return
        seconds = END_OF_RUN if self._complete else STOP
        self._queue.put(_End(self._complete))
        self._thread.join(seconds)
        if not self._delivered:
            cause = f" within {seconds:.0f} s" if self._thread.is_alive() else f": {self._failure}"
            self._warn(
                f"warning: {self._service.setting}: not everything was delivered{cause}; start the same command again "
                "to deliver what is missing"
            )
        if self._thread.is_alive():
            self._service.abandon()
        elif self._delivered and self._row is None:
            with suppress(UserError):  # then the next start finds that nothing is missing
                note_undelivered(self._facts.exp, self._service.setting, undelivered=False)
        self._thread = None

    def _row_of(self, update: int) -> Row:
        if self._row is not None and self._row.update != update:
            self.commit(self._row.update)
        if self._row is None:
            self._row = Row(update)
        return self._row

    def _open(self) -> None:
        if self._thread is None:
            note_undelivered(self._facts.exp, self._service.setting, undelivered=True)
            self._thread = threading.Thread(target=self._deliver, daemon=True, name=self._service.setting)
            self._thread.start()
        if self._begin is not None:
            self._queue.put(self._begin)
            self._begin = None

    def _put(self, row: Row) -> None:
        self._open()
        with self._lock:
            self._committed = row.update
            self._behind = self._behind or self._queue.qsize() >= ROWS
            if not self._behind:
                self._queue.put(row)
                return
        self._warn_of_gap()

    def _deliver(self) -> None:
        """Deliver rows in order until the run ends. After a failure, the same row is tried again."""
        unsent: deque[Row] = deque()
        who, again, last, room = None, 0.0, -1, ROWS
        opened = behind = False
        while True:
            command = self._queue.get()
            if isinstance(command, _Begin):
                # If the run has gone back, what has not been delivered is not of its curve any more.
                unsent, room = deque(command.rows), ROWS + len(command.rows)
                who, opened, last, behind = command.who, False, -1, False
            elif isinstance(command, Row):
                if behind or len(unsent) >= room:  # a service may take no earlier row after a later one
                    behind = True
                    self._warn_of_gap()
                else:
                    unsent.append(command)
            ending = isinstance(command, _End)
            if time.monotonic() < again and not ending:
                continue
            assert who is not None
            try:
                if not opened:
                    self._service.open(who)
                    opened = True
                while unsent or behind or self._behind:
                    if not unsent:
                        behind = True  # also if this fails
                        if (rows := self._read_back(who, after=last)) is None:
                            break
                        unsent, room, behind = deque(rows), ROWS + len(rows), False
                        continue
                    row = unsent[0]
                    if row.update > last:  # else it was in the queue and was read back, too
                        if not self._service.has(row):
                            self._service.send(row)
                        last = row.update
                    unsent.popleft()
                self._warned = False
                if isinstance(command, _End):
                    self._service.close(complete=command.complete)
                    self._delivered = True
            except Exception as error:
                self._failure = " ".join(str(error).split())[:300] or type(error).__name__
                if not ending:  # else `close` warns
                    self._warn_once(self._failure)
                again, opened = time.monotonic() + RETRY, False
            if ending:
                return

    def _read_back(self, who: Identity, *, after: int) -> list[Row] | None:
        """Read the complete rows after an update from the run folder; None if the run has gone back meanwhile."""
        with self._lock:
            last, self._behind = self._committed, self._behind and self._who is not who
        rows = [row for row in read_rows(self._facts.exp) if after < row.update <= last]
        with self._lock:
            return rows if self._who is who else None

    def _warn_of_gap(self) -> None:
        self._warn_once(
            f"more than {ROWS} updates wait for the service; the next ones will be read from {self._facts.exp}"
        )

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {self._service.setting}: {text}; training goes on")
