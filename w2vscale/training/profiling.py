"""`trainer.profile`: a Chrome trace of a few updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Profiler:
    """Records the `updates`, counted from 1, on a rank where it is `enabled`, once in a process.

    If the run is stopped or ends among them, the trace has those that were run.
    """

    def __init__(self, updates: range, folder: Path, *, enabled: bool, log: Callable[[str], None]) -> None:
        self._updates, self._folder, self._log = updates if enabled else range(0), folder, log
        self._running: profile | None = None
        self._first = self._newest = 0

    def due(self, update: int) -> bool:
        """Whether this update starts or ends the recording, which takes seconds."""
        return bool(self._updates) and update in (*self._updates[:1], self._updates[-1])

    @contextmanager
    def recording(self, update: int) -> Iterator[None]:
        """Record the block, which runs an update, if it is one of those to record."""
        if update not in self._updates:
            yield
            return
        if self._running is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running, self._first = profile(activities=activities), update
            self._running.start()
        with record_function(f"update {update}"):
            yield
        self._newest = update
        if update == self._updates[-1]:
            self.close()

    def close(self) -> None:
        """End the recording and write the trace, unless that is done. A failure is a warning."""
        running, self._running = self._running, None
        if running is None:
            return
        self._updates = range(0)
        running.stop()
        if self._newest < self._first:
            return
        path = self._folder / f"updates_{self._first:08d}_to_{self._newest:08d}.json.gz"
        partial = path.with_name(f".{path.name.removesuffix('.json.gz')}.partial.json.gz")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(partial))  # compressed because of the name
            partial.replace(path)
        except OSError as error:
            self._log(f"warning: {path}: cannot be written: {error.strerror or error}")
            return
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        self._log(
            f"profile: {path} is the trace of updates {self._first} to {self._newest}; open it at https://ui.perfetto.dev"
            " or chrome://tracing"
        )
