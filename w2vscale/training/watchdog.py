"""Ends a run that hangs, and says where each rank is.

Every rank notes its progress. A thread of each rank sends it to rank 0 through a connection that does not depend on the
process group. A rank that makes no progress, or whose thread is not heard of (a stopped process, a lost machine), ends
the run on all ranks with exit code 75. No checkpoint is written then, because the ranks may be in the middle of an
update: the same command continues from the newest one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from w2vscale.distributed.process_group import Ranks, gather_from_ranks, side_store
from w2vscale.errors import TemporaryError
from w2vscale.files import regular
from w2vscale.runtime import StopRequest

TICK = 0.5  # seconds between looks at this process
SLOW = 10  # factor of the allowed time for slow places
SHOWN = 8  # ranks in a report


class Progress(NamedTuple):
    """Where the main thread of a rank is."""

    place: str
    since: float  # on the monotonic clock
    slow: bool


class Report(NamedTuple):
    """What a rank sends to rank 0."""

    number: int  # of the report
    place: str
    seconds: float  # without progress
    allowed: float
    children: str = ""  # those that are stopped

    def text(self) -> str:
        """Describe the place of the rank."""
        return f"{self.place} for {self.seconds:.0f} s{self.children}"


class Watchdog:
    """Watches all ranks in a `with` block, which is collective.

    `seconds` is the setting `watchdog.seconds`; `grace` is `checkpoint.grace_seconds`, within which a rank that has
    received a stop signal must leave the block, or else its process exits. Stacks are written to `folder`. `log` gets
    the problem that ends the process.
    """

    def __init__(
        self, ranks: Ranks, folder: Path, *, seconds: float, stop: StopRequest, grace: float,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.ranks, self.folder, self.seconds, self.stop, self.grace = ranks, folder, seconds, stop, grace
        self.log = log
        self.every = min(seconds / 5, 5.0)  # seconds between reports
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        self._store: dist.Store | None = None
        self._heard: dict[int, tuple[int, float]] = {}
        self._reports = 0
        self._answered = time.monotonic()
        self._hosts: list[str] = []
        self.at("starting", slow=True)

    def at(self, place: str, *, slow: bool = False) -> None:
        """Note progress. `slow`: the next note may take ten times longer than others."""
        self._progress = Progress(place, time.monotonic(), slow)

    def __enter__(self) -> Watchdog:
        if self.seconds and self.ranks.world_size > 1:
            self._store = side_store(timedelta(seconds=self.every))
            self._store.set("verdict", "")
            self._send()
            self._hosts = gather_from_ranks(socket.gethostname())  # now every rank has sent a report
            # A thread of its own, because it may wait for a rank 0 that never answers.
            self._threads.append(threading.Thread(target=self._talk, name="watchdog-talk", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(TICK)

    def _watch(self) -> None:
        """Watch this process. Never waits for another one."""
        while not self._ended.wait(min(TICK, self.every or TICK)):
            now = time.monotonic()
            # A rank that cannot save exits before its launcher kills it.
            patience = self.grace - min(5.0, self.grace / 5)
            if (stop := self.stop.arrived()) is not None and now - stop[1] > patience:
                number, _ = stop
                self._end(
                    f"rank {self.ranks.rank} could not stop within checkpoint.grace_seconds={self.grace:g} after "
                    f"{number.name}: at {self._report().text()}",
                    code=128 + number,
                )
            if self._store is None:
                if self.seconds and (own := self._report()).seconds > own.allowed:
                    self._end(f"no progress: {own.text()}")
            elif (silence := now - self._answered) > self.seconds:
                # Rank 0 reports for all, so its silence is reported by the first of the others.
                self._end(f"{self._name(0)} has not been heard of for {silence:.0f} s", shown=self.ranks.rank == 1)

    def _talk(self) -> None:
        """Exchange reports and the verdict through rank 0."""
        lost = False
        while not self._ended.wait(self.every):
            before = self._answered
            try:
                self._exchange()
            except RuntimeError:  # a time-out, or a connection that is broken
                lost = True
                continue
            if lost:
                lost = False
                silence = self._answered - before
                text = f"warning: {self._name(self.ranks.rank)} had no answer from {self._name(0)} for {silence:.0f} s"
                os.write(2, f"{text}; the run goes on\n".encode())

    def _exchange(self) -> None:
        assert self._store is not None
        self._send()
        verdict = self._store.get("verdict").decode()
        self._answered = time.monotonic()
        if verdict:
            self._end(verdict, shown=False)
        if self.ranks.is_main and (problem := self._judge(self._receive())):
            self._store.set("verdict", problem)
            self._end(problem, wait=2 * self.every)

    def _report(self) -> Report:
        progress = self._progress
        self._reports += 1
        allowed = self.seconds * (SLOW if progress.slow else 1)
        return Report(self._reports, progress.place, time.monotonic() - progress.since, allowed, _children())

    def _send(self) -> None:
        assert self._store is not None
        self._store.set(str(self.ranks.rank), json.dumps(self._report()))

    def _receive(self) -> list[Report]:
        assert self._store is not None
        values = self._store.multi_get([str(rank) for rank in range(self.ranks.world_size)])
        return [Report(*json.loads(value)) for value in values]

    def _judge(self, reports: Sequence[Report]) -> str | None:
        """What is wrong, judging by the newest report of each rank, or None."""
        now = time.monotonic()
        silent: dict[int, float] = {}
        for rank, report in enumerate(reports):
            number, since = self._heard.get(rank, (0, now))
            if report.number != number:
                self._heard[rank] = (report.number, now)
            elif now - since > self.seconds:
                silent[rank] = now - since
        if not silent and all(report.seconds <= report.allowed for report in reports):
            return None
        lines = [
            f"{self._name(rank)}: not heard of for {silent[rank]:.0f} s, last at {reports[rank].place}"
            if rank in silent
            else f"{self._name(rank)}: at {reports[rank].text()}"
            for rank in sorted(range(len(reports)), key=lambda rank: (rank not in silent, *_order(reports[rank])))
        ]
        more = f"; and {len(lines) - SHOWN} more ranks" if len(lines) > SHOWN else ""
        return f"no progress: {'; '.join(lines[:SHOWN])}{more}"

    def _name(self, rank: int) -> str:
        """Name a rank and, if there are several, its host."""
        return f"rank {rank} on {self._hosts[rank]}" if len(set(self._hosts)) > 1 else f"rank {rank}"

    def _end(
        self, problem: str, *, code: int = TemporaryError.exit_code, shown: bool = True, wait: float = 0.0
    ) -> None:
        """Write the stacks of this rank, print the problem if `shown`, and end the process."""
        if self._ended.is_set():
            return
        stacks = self.folder / f"stacks_rank_{self.ranks.rank}.txt"
        try:
            with suppress(OSError), open(stacks, "w", opener=regular) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {problem}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            self._dump_collectives()
            if shown:
                advice = "no checkpoint is written; the same command continues from the newest one"
                text = f"error: watchdog: {problem}; {advice}; the stacks are in {self.folder}/stacks_rank_*.txt\n"
                os.write(2, text.encode())
                self.log(text)
            time.sleep(wait)  # the other ranks read the verdict from this process
        finally:
            os._exit(code)

    def _dump_collectives(self) -> None:
        """Write the last collectives of NCCL, its flight recorder."""
        if self.ranks.world_size > 1 and torch.cuda.is_available():
            with suppress(Exception):
                trace = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
                with open(self.folder / f"collectives_rank_{self.ranks.rank}.json", "wb", opener=regular) as file:
                    file.write(trace)


def _order(report: Report) -> tuple[bool, float]:
    return not report.children, -report.seconds


def _children() -> str:
    """Name the child processes of this rank that are stopped or wait for a disk."""
    found = []
    for pid in _pids_of_children():
        with suppress(OSError, IndexError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in STATES:
                found.append(f", its child process {pid} {STATES[state]}")
    return "".join(found)


STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "D": "waits for a disk or device"}


def _pids_of_children() -> Iterator[str]:
    with suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                yield from (task / "children").read_text().split()
