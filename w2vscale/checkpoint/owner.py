"""The owner of a folder in a store: one process at a time uploads the checkpoints of one run there.

The owner writes the object `owner.json` again and again. One that has not done so for LEASE seconds has ended, as has
one whose process does not exist any more on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.errors import UserError
from w2vscale.storage.objects import ATTEMPTS, Missing, read, write
from w2vscale.storage.urls import Url

BEAT = 20.0  # seconds between two writes of the owner
LEASE = 90.0  # seconds without a write after which the owner is taken to have ended
LOOK = 2.0  # seconds between two reads while waiting for another owner
GOODBYE = 5.0  # seconds that the last write may take
LARGEST = 2**16  # bytes of owner.json


class TakenOver(UserError):
    """Another process has become the owner."""


class Last(NamedTuple):
    """The last owner of a store: the id of its run, None if unknown, and the folder of the run."""

    run: str | None
    folder: str


class Owner:
    """This process as the owner of the folder `url`. `exp` is the folder of its run."""

    def __init__(self, url: Url, exp: Path, log: Callable[[str], None]) -> None:
        self.url, self.log = url / "owner.json", log
        self._nonce = uuid.uuid4().hex
        self._about = {
            "nonce": self._nonce,
            **process_identity(os.getpid()),
            "folder": str(exp.absolute()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._beats = 0
        self._lost: TakenOver | None = None
        self._ended, self._say_so = threading.Event(), False
        self._thread = threading.Thread(target=self._keep, name="store-owner", daemon=True)

    def wait_for_other(self, progress: Callable[[], None] = lambda: None) -> Last:
        """Wait until no other process is the owner, and call `progress` meanwhile. Returns the last owner.

        Raises UserError if another process writes to the object meanwhile.
        """
        other = self._other()
        if other is not None and not _has_ended(other):
            self.log(f"{self.url}: written by {_name(other)}; waiting up to {LEASE:.0f} s to see whether it still runs")
            deadline, first = time.monotonic() + LEASE, other
            while other is not None and _beat(other) == _beat(first) and time.monotonic() <= deadline:
                time.sleep(LOOK)
                progress()
                other = self._other()
            if other is not None and _beat(other) != _beat(first) and not other.get("ended"):
                raise UserError(f"{self.url}: the store is in use by {_name(other)}; stop that run first, or choose "
                                "another checkpoint.store")  # fmt: skip
        run, folder = (other or {}).get("run"), (other or {}).get("folder")
        return Last(run if isinstance(run, str) else None, str(folder))

    def acquire(self, run: str) -> None:
        """Become the owner, for the run with this id."""
        self._about["run"] = run
        self._write()
        self._thread.start()

    def require(self) -> None:
        """Raise TakenOver if another process has become the owner, now or earlier."""
        if self._lost is None and (other := self._other()) is not None:
            self._lost = TakenOver(f"{self.url}: taken over by {_name(other)}; stop one of the two runs")
        if self._lost is not None:
            raise self._lost

    def release(self, *, ended: bool) -> None:
        """Stop writing. `ended`: tell the next run that this one writes nothing more, if the store answers soon."""
        if self._thread.is_alive():
            self._say_so = ended
            self._ended.set()
            if ended:
                self._thread.join(GOODBYE)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(UserError):  # the next upload will say what is wrong
                if self._other() is not None:
                    return
                self._write(attempts=1)  # a later attempt could replace what a new owner has written
        with suppress(UserError):
            if self._say_so and self._other() is None:
                self._write(ended=True, attempts=1)

    def _write(self, *, ended: bool = False, attempts: int = ATTEMPTS) -> None:
        self._beats += 1
        content = json.dumps({**self._about, "beat": self._beats, "ended": ended}).encode()
        write(self.url, content, attempts=attempts)

    def _other(self) -> dict[str, Any] | None:
        """What the object says of another owner; None if there is none."""
        try:
            content = json.loads(read(self.url, limit=LARGEST))
        except Missing:
            return None
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            return None  # not written by a run
        return content if isinstance(content, dict) and content.get("nonce") != self._nonce else None


def process_identity(pid: int) -> dict[str, Any]:
    """What tells a process from all others: host, boot, namespace of process ids, id, and start. None if unknown."""
    found: dict[str, Any] = {"host": socket.gethostname(), "boot": None, "namespace": None, "pid": pid, "start": None}
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
    with suppress(OSError, IndexError):
        # The name of the program, in parentheses, may hold spaces. Field 22 is the start in clock ticks since boot.
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        found["start"] = int(stat.rpartition(")")[2].split()[19])
    return found


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether an owner is known to have ended: it says so, or its process does not exist any more on this machine."""
    if owner.get("ended"):
        return True
    pid = owner.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    now = process_identity(pid)
    if any(now[key] is None or owner.get(key) != now[key] for key in ("host", "boot", "namespace")):
        return False  # this machine cannot see its process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return None not in (now["start"], owner.get("start")) and owner["start"] != now["start"]


def _beat(owner: dict[str, Any]) -> tuple[Any, Any]:
    return owner.get("nonce"), owner.get("beat")


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')} ({owner.get('folder')})"
