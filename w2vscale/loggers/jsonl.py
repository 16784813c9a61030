"""metrics.jsonl, which all other loggers follow, and logs/notes.jsonl with what is not a metric."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from w2vscale.checkpoint.format import TrainState
from w2vscale.errors import counted
from w2vscale.files import read_log, regular, write_text, writing
from w2vscale.loggers.base import Histogram, Logger

METRICS = "metrics.jsonl"
NOTES = "logs/notes.jsonl"


class JsonLines:
    """A log of records with an `update`. A run that continues first deletes those of later updates.

    Methods raise UserError if the file cannot be written.
    """

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path, self._log = path, log
        self._file: TextIO | None = None

    def continue_from(self, update: int) -> None:
        """Delete the records of later updates, and of all updates if nothing has been learned yet."""
        self.close()
        with writing(self.path):
            if self.path.is_file():
                records, unreadable = read_log(self.path)
                if unreadable > (1 if records else 0):  # a killed process may leave its last line incomplete
                    self._log(f"warning: {self.path}: dropping {counted(unreadable, 'line')} that cannot be read")
                kept = [line for line in records if update and _update_of(line) <= update]
                write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = open(self.path, "a", encoding="utf-8", opener=regular)  # noqa: SIM115

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        assert self._file is not None
        with writing(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # `append` has reported it
            if self._file is not None:
                self._file.close()


class JsonLogger(Logger):
    """Writes metrics.jsonl and logs/notes.jsonl. Values that are not finite become null."""

    def __init__(self, exp: Path, log: Callable[[str], None]) -> None:
        self.metrics, self.notes = JsonLines(exp / METRICS, log), JsonLines(exp / NOTES, log)

    def continue_from(self, state: TrainState) -> None:
        with writing(self.notes.path):
            self.notes.path.parent.mkdir(parents=True, exist_ok=True)
        self.metrics.continue_from(state.update)
        self.notes.continue_from(state.update)

    def scalars(self, split: str, update: int, values: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.metrics.append({"split": split, "update": update, **finite})

    def text(self, name: str, update: int, text: str) -> None:
        self.notes.append({"update": update, "name": name, "text": text})

    def histogram(self, name: str, update: int, histogram: Histogram) -> None:
        self.notes.append({"update": update, "name": name, "histogram": asdict(histogram)})

    def close(self) -> None:
        self.metrics.close()
        self.notes.close()


def _update_of(line: Mapping[str, Any]) -> float:
    """The update of a line; infinite if the line is damaged."""
    update = line.get("update")
    return update if isinstance(update, int) else math.inf
