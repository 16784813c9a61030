"""The owner of a folder in a store: one run at a time uploads its checkpoints there.

The owner writes the object `owner.json` again and again. One that has not done so for LEASE seconds has ended, as has
one whose process does not exist any more on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2vscale.errors import UserError
from w2vscale.storage.objects import Missing, read, write
from w2vscale.storage.urls import Url

BEAT = 20.0  # seconds between two writes of the owner
LEASE = 90.0  # seconds without a write after which the owner is taken to have ended
LOOK = 2.0  # seconds between two looks at another owner
GOODBYE = 5.0  # seconds that the last write may take
LARGEST = 2**16  # bytes of owner.json


class Owner:
    """This run as the owner of the folder `url`. `token` identifies its local folder, and `exp` is its path."""

    def __init__(self, url: Url, token: str, exp: Path, log: Callable[[str], None]) -> None:
        self.url, self.token, self.log = url / "owner.json", token, log
        self._about = {
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(exp.absolute()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store-owner", daemon=True)

    def acquire(self) -> None:
        """Become the owner. Raises UserError if another run is, and writes to the object meanwhile."""
        if (other := self._other()) is not None and not self._has_ended(other):
            self.log(f"{self.url}: written by {_name(other)}; waiting up to {LEASE:.0f} s to see whether it still runs")
            deadline = time.monotonic() + LEASE
            while (now := self._other()) is not None and now.get("beat") == other.get("beat"):
                if time.monotonic() > deadline:
                    break
                time.sleep(LOOK)
            else:
                if now is not None and not now.get("ended"):
                    raise UserError(f"{self.url}: the store is in use by {_name(now)}; stop that run first, or choose "
                                    "another checkpoint.store")  # fmt: skip
        self._write()
        self._thread.start()

    def require(self) -> None:
        """Raise UserError if another run has become the owner."""
        if (other := self._other()) is not None:
            raise UserError(f"{self.url}: taken over by {_name(other)}; this run does not upload any more")

    def release(self) -> None:
        """Tell the next run that this one has ended, if the store answers soon."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join(GOODBYE)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(UserError):  # the next upload will say what is wrong
                if self._other() is not None:
                    return
                self._write()
        with suppress(UserError):
            if self._other() is None:
                self._write(ended=True)

    def _write(self, *, ended: bool = False) -> None:
        self._beats += 1
        write(self.url, json.dumps({**self._about, "beat": self._beats, "ended": ended}).encode())

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
        return content if isinstance(content, dict) and content.get("token") != self.token else None

    def _has_ended(self, other: dict[str, Any]) -> bool:
        if other.get("ended"):
            return True
        if other.get("host") != socket.gethostname():
            return False
        try:
            os.kill(int(other["pid"]), 0)
        except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
            return True
        except OSError:
            return False
        return False


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')} ({owner.get('folder')})"
