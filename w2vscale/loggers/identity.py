"""The name of a run in a tracking service, and whether one lacks something: both are kept in logs/loggers.json."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from w2vscale.checkpoint.format import TrainState
from w2vscale.files import read_text, write_text

FILE = "logs/loggers.json"


@dataclass(frozen=True)
class Identity:
    """Names of a run. After a roll back its curve is another one, so it has another `id` in the same `group`."""

    group: str
    skipped_windows: int
    folder: str  # name of the run folder

    @property
    def id(self) -> str:
        """Unique among all runs of a service."""
        return f"{self.group}-skipped-{self.skipped_windows}" if self.skipped_windows else self.group

    @property
    def title(self) -> str:
        """A name to show."""
        return f"{self.folder} (skipped {self.skipped_windows})" if self.skipped_windows else self.folder


@dataclass(frozen=True)
class Record:
    """The content of logs/loggers.json."""

    group: str
    settings: str  # checksum
    undelivered: Sequence[str] = ()  # settings of the services that may lack something of the run


def identity(exp: Path, settings: Mapping[str, Any], state: TrainState) -> Identity:
    """Return the names of the run in `exp`; new ones if it has none, or starts again with other settings.

    Raises UserError if the file cannot be written.
    """
    folder = exp.resolve().name
    checksum = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    record = _read(exp)
    if record is None or (not state.update and record.settings != checksum):
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", folder)[:64]
        record = Record(f"{readable}-{uuid.uuid4().hex[:8]}", checksum)
        _write(exp, record)
    return Identity(record.group, state.skipped_windows, folder)


def is_undelivered(exp: Path, service: str) -> bool:
    """Whether a service, named by its setting, may lack something that the run in `exp` has logged."""
    record = _read(exp)
    return record is not None and service in record.undelivered


def note_undelivered(exp: Path, service: str, *, undelivered: bool) -> None:
    """Note whether a service may lack something. Raises UserError if the file cannot be written."""
    record = _read(exp)
    if record is not None and undelivered != (service in record.undelivered):
        others = [one for one in record.undelivered if one != service]
        _write(exp, replace(record, undelivered=[*others, service] if undelivered else others))


def _read(exp: Path) -> Record | None:
    with suppress(OSError, ValueError, TypeError):
        return Record(**json.loads(read_text(exp / FILE)))
    return None


def _write(exp: Path, record: Record) -> None:
    write_text(exp / FILE, json.dumps(asdict(record)) + "\n")
