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
SECTIONS_WITHOUT_EFFECT = ("engine", "checkpoint", "watchdog", "health", "logging")
KEYS_WITHOUT_EFFECT: Mapping[str, Sequence[str]] = {
    "data": ("url_schemes", "max_bad_fraction", "workers", "prefetch"),
    "trainer": ("best_metric", "early_stopping", "max_hours", "profile", "max_skipped_in_a_row"),
}
"""Sections and keys of the settings that do not change the values of an update."""


@dataclass(frozen=True)
class Identity:
    """Names of a run. Where a part of its curve is replaced by another, it has another `id` in the same `group`."""

    group: str
    skipped_windows: int
    folder: str  # name of the run folder
    replaced: int = 0  # how often a start has replaced a part of the curve

    @property
    def id(self) -> str:
        """Unique among all runs of a service."""
        again = f"-restart-{self.replaced}" if self.replaced else ""
        return self.group + again + (f"-skipped-{self.skipped_windows}" if self.skipped_windows else "")

    @property
    def title(self) -> str:
        """A name to show."""
        again = f" (restart {self.replaced})" if self.replaced else ""
        return self.folder + again + (f" (skipped {self.skipped_windows})" if self.skipped_windows else "")


@dataclass(frozen=True)
class Record:
    """The content of logs/loggers.json."""

    group: str
    settings: str  # checksum
    curve: str = ""  # checksum of those that change the curve; empty in files of earlier versions
    replaced: int = 0
    undelivered: Sequence[str] = ()  # settings of the services that may lack something of the run


def identity(exp: Path, settings: Mapping[str, Mapping[str, Any]], state: TrainState) -> Identity:
    """Return the names of the run in `exp`; new ones if it has none, or starts again with other settings.

    Raises UserError if the file cannot be written.
    """
    folder = exp.resolve().name
    checksum = _checksum(settings)
    record = _read(exp)
    if record is None or (not state.update and record.settings != checksum):
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", folder)[:64]
        record = Record(f"{readable}-{uuid.uuid4().hex[:8]}", checksum, _checksum(with_effect(settings)))
        _write(exp, record)
    return Identity(record.group, state.skipped_windows, folder, record.replaced)


def note_start(
    exp: Path, settings: Mapping[str, Mapping[str, Any]], state: TrainState, *, logged: int, named: bool
) -> str | None:
    """Note with which settings a run continues from `state`. Return why it gets another name, if it does.

    It does if updates up to `logged` would be logged with other values: services keep those that they have. `named`:
    the command names the checkpoint, which may be of another run. Raises UserError if the file cannot be written.
    """
    record, curve = _read(exp), _checksum(with_effect(settings))
    if record is None or not state.update:
        return None
    changed = record.curve not in ("", curve)
    again = logged > state.update and (changed or named)
    _write(exp, replace(record, curve=curve, replaced=record.replaced + again))
    if not again:
        return None
    cause = "other settings" if changed else "the checkpoint of --resume"
    return f"updates {state.update + 1} to {logged} are logged again, with {cause}"


def with_effect(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of the settings that change the curve."""
    return {
        section: {key: value for key, value in values.items() if key not in KEYS_WITHOUT_EFFECT.get(section, ())}
        for section, values in settings.items()
        if section not in SECTIONS_WITHOUT_EFFECT
    }


def _checksum(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
