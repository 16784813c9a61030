"""Reads `logs/events.jsonl`: when a run was started and stopped, on what hardware, and what happened to it.

The log is only ever appended to. Unknown events, missing keys, values of another type and damaged lines are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_records

Kind = Literal["health", "warning", "roll_back", "stop"]
LARGEST = 2**53  # of a number; a larger one is damaged


@dataclass(frozen=True)
class Start:
    """The start of a run, or its continuation. None: not recorded."""

    update: int
    time: str | None = None  # ISO 8601, UTC
    host: str | None = None
    devices: str | None = None
    processes: int | None = None
    engine: str | None = None
    objective: str | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    hours: float | None = None  # of the training set
    utterances: int | None = None
    padding: float | None = None  # share of silence in the planned micro-batches
    validation: str | None = None
    updates: int | None = None
    epochs: float | None = None
    w2vscale: str | None = None
    torch: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class Event:
    """What happened to a run at an update."""

    kind: Kind
    update: int
    text: str
    time: str | None = None
    finding: str | None = None  # which trouble, of a health event
    left_at: int | None = None  # the update at which a run that went back was
    early: bool = False  # a stop by early stopping: the run is complete

    @property
    def title(self) -> str:
        """The kind of the event in words."""
        return self.finding or self.kind.replace("_", " ")


@dataclass(frozen=True)
class Events:
    """The events of a run, in the order of the log."""

    starts: tuple[Start, ...] = ()
    happened: tuple[Event, ...] = ()
    stopped: Event | None = None  # if the run has not been started again since

    def distinct(self) -> list[Event]:
        """What happened, without repetitions at the same update, as after a resume."""
        first: dict[tuple[object, ...], Event] = {}
        for one in self.happened:
            first.setdefault((one.kind, one.finding or one.text, one.update), one)
        return list(first.values())


def read_events(exp: Path) -> Events:
    """Read the events of a run folder; none if it has no such log. Raises UserError if the log cannot be read."""
    path = exp / "logs" / "events.jsonl"
    try:
        records = read_records(path)
    except (FileNotFoundError, NotADirectoryError):
        return Events()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{nearest_path(path)}") from None
    starts: list[Start] = []
    happened: list[Event] = []
    stopped = None
    for record in records:
        kind: Any = record.get("event")
        update = _whole(record, "update")
        if update is None:
            continue
        if kind == "start":
            starts.append(_start(record, update))
            stopped = None
        elif kind in get_args(Kind):
            event = Event(
                kind, update, _text(record, "text") or "", _text(record, "time"),
                _text(record, "kind") if kind == "health" else None, _whole(record, "left_at"),
                record.get("early") is True,
            )  # fmt: skip
            happened.append(event)
            stopped = event if kind == "stop" else stopped
    return Events(tuple(starts), tuple(happened), stopped)


def _start(record: Mapping[str, Any], update: int) -> Start:
    training = record.get("training")
    training = training if isinstance(training, Mapping) else {}
    return Start(
        update,
        time=_text(record, "time"),
        host=_text(record, "host"),
        devices=_text(record, "devices"),
        processes=_whole(record, "processes"),
        engine=_text(record, "engine"),
        objective=_text(record, "objective"),
        parameters=_whole(record, "parameters"),
        trained_parameters=_whole(record, "trained_parameters"),
        hours=_number(training, "hours"),
        utterances=_whole(training, "utterances"),
        padding=_number(training, "padding"),
        validation=_text(record, "validation"),
        updates=_whole(record, "updates"),
        epochs=_number(record, "epochs"),
        w2vscale=_text(record, "w2vscale"),
        torch=_text(record, "torch"),
        cuda=_text(record, "cuda"),
    )


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    return value[:2000] if isinstance(value, str) else None


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value: Any = record.get(key)
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST and math.isfinite(value) else None


def _whole(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if type(value) is int and 0 <= value <= LARGEST else None
