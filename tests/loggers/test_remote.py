"""A service that fails, hangs or is slow costs a run nothing but a warning, and gets every row once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.logged import log_updates, opened, state
from w2vscale.loggers import remote
from w2vscale.loggers.base import Logger, RunFacts
from w2vscale.loggers.fan_out import Loggers
from w2vscale.loggers.identity import Identity
from w2vscale.loggers.remote import RemoteLogger, Service
from w2vscale.loggers.rows import Row


class Memory(Service):
    """A service that keeps rows by run in this process, fails while it is `down`, and hangs while it is `hung`."""

    setting = "logging.memory=here"

    def __init__(self) -> None:
        self.runs: dict[str, list[Row]] = {}
        self.down = False
        self.hung = threading.Event()
        self.hung.set()
        self.abandoned = False
        self.ends: list[bool] = []

    def open(self, who: Identity) -> None:
        self._answer()
        self.who = who
        self.run = self.runs.setdefault(who.id, [])

    def has(self, row: Row) -> bool:
        return row.update in [one.update for one in self.run]

    def send(self, row: Row) -> None:
        self._answer()
        self.run.append(row)

    def close(self, *, complete: bool) -> None:
        self.ends.append(complete)

    def abandon(self) -> None:
        self.abandoned = True

    def _answer(self) -> None:
        self.hung.wait()
        if self.down:
            raise ConnectionError("no route to\nhost")


def continued(exp: Path, service: Memory, warnings: list[str], at: int = 0, skipped: int = 0) -> Loggers:
    """The files of a run in `exp` and a logger to `service`."""
    opened(exp, at=state(at)).close()
    local: list[Logger] = list(opened(exp, at=state(at))._loggers)
    logger = RemoteLogger(service, RunFacts(exp, {}, None), warnings.append)  # type: ignore[arg-type]
    logger.continue_from(state(at, skipped_windows=skipped))
    return Loggers(exp, [*local, logger])


def end(loggers: Loggers) -> None:
    loggers.finish()
    loggers.close()


def updates(service: Memory) -> list[list[int]]:
    return [[row.update for row in run] for run in service.runs.values()]


def test_a_resumed_run_sends_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    service, warnings = Memory(), list[str]()
    log_updates(continued(tmp_path, service, warnings), range(1, 9))
    deadline = time.monotonic() + 10
    while updates(service) != [list(range(9))] and time.monotonic() < deadline:
        time.sleep(0.01)
    (rows,) = service.runs.values()
    del rows[5:]  # the service had not stored them when the process was killed
    loggers = continued(tmp_path, service, warnings, at=7)
    log_updates(loggers, range(8, 13))
    end(loggers)
    assert updates(service) == [list(range(13))] and not warnings and service.ends == [True]
    assert rows[4].images and rows[8].images and rows[5].texts and rows[4].histograms, "read back from the folder"


def test_a_validation_that_was_interrupted_joins_the_row_of_its_update(tmp_path: Path) -> None:
    service, warnings = Memory(), list[str]()
    loggers = continued(tmp_path, service, warnings)
    log_updates(loggers, range(1, 4))
    loggers.write("train", 4, {"loss": 1.0, "hours_seen": 0.1})
    loggers.close()
    assert updates(service) == [[0, 1, 2, 3]] and service.ends == [False]
    loggers = continued(tmp_path, service, warnings, at=4)
    loggers.write("validation", 4, {"loss": 2.0, "hours_seen": 0.1})
    loggers.commit(4)
    end(loggers)
    (rows,) = service.runs.values()
    assert [row.update for row in rows] == [0, 1, 2, 3, 4] and set(rows[4].scalars) == {"train", "validation"}


def test_after_a_roll_back_a_new_run_of_the_same_group_has_the_curve(tmp_path: Path) -> None:
    service, warnings = Memory(), list[str]()
    loggers = continued(tmp_path, service, warnings)
    log_updates(loggers, range(1, 9))
    loggers.continue_from(state(6, skipped_windows=2))
    log_updates(loggers, range(7, 11))
    end(loggers)
    first, second = service.runs
    assert second == f"{first}-skipped-2" and service.who.group == first
    assert updates(service) == [list(range(9)), list(range(11))]


def test_a_service_that_fails_is_warned_of_once_and_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY", 0.0)
    service, warnings = Memory(), list[str]()
    service.down = True
    loggers = continued(tmp_path, service, warnings)
    log_updates(loggers, range(1, 6))
    deadline = time.monotonic() + 10
    while not warnings and time.monotonic() < deadline:
        time.sleep(0.01)
    service.down = False
    log_updates(loggers, range(6, 8))
    end(loggers)
    assert warnings == ["warning: logging.memory=here: no route to host; training goes on"]
    assert updates(service) == [list(range(8))]


def test_each_failure_is_warned_of_and_the_end_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY", 0.0)
    service, warnings = Memory(), list[str]()
    loggers = continued(tmp_path, service, warnings)

    def log(update: int, until: Callable[[], object]) -> None:
        log_updates(loggers, range(update, update + 1))
        deadline = time.monotonic() + 10
        while not until() and time.monotonic() < deadline:
            time.sleep(0.01)

    failed = "warning: logging.memory=here: no route to host; training goes on"
    service.down = True
    log(1, lambda: warnings)
    service.down = False
    log(2, lambda: updates(service) == [[0, 1, 2]] and not loggers._loggers[-1]._warned)  # type: ignore[attr-defined]
    service.down = True
    log(3, lambda: len(warnings) > 1)
    assert warnings == [failed, failed]
    end(loggers)
    assert warnings[2:] == [
        "warning: logging.memory=here: not everything was delivered: no route to host; start the same command again to "
        "deliver what is missing"
    ]
    service.down = False
    end(continued(tmp_path, service, warnings, at=3))
    assert updates(service) == [[0, 1, 2, 3]] and len(warnings) == 3


def test_a_service_that_hangs_does_not_hold_the_run_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "END_OF_RUN", 0.2)
    monkeypatch.setattr(remote, "ROWS", 3)
    service, warnings = Memory(), list[str]()
    service.hung.clear()
    loggers = continued(tmp_path, service, warnings)
    log_updates(loggers, range(1, 13))
    end(loggers)
    service.hung.set()
    assert "not everything was delivered within 0 s; start the same command again" in warnings[-1]
    assert f"more than 3 updates wait for the service; the next ones will be read from {tmp_path}" in warnings[0]
    assert service.abandoned and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 15


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_rows_that_do_not_fit_in_memory_are_read_back_without_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Memory, like W&B, would otherwise take rows in the order in which they come."""
    monkeypatch.setattr(remote, "ROWS", 3)
    log_updates(continued(tmp_path, Memory(), []), range(1, 11))
    service, warnings = Memory(), list[str]()
    if trouble == "hangs":
        service.hung.clear()
    service.down = trouble == "fails"
    loggers = continued(tmp_path, service, warnings, at=10)  # more to replay than fits
    for update in range(11, 31):
        log_updates(loggers, range(update, update + 1))
        time.sleep(0.01)
    assert any("more than 3 updates wait" in warning for warning in warnings) or trouble == "fails"
    service.down = False
    service.hung.set()
    log_updates(loggers, range(31, 41))
    end(loggers)
    assert updates(service) == [list(range(41))] and service.ends == [True]


def test_a_start_with_other_settings_is_another_run(tmp_path: Path) -> None:
    from w2vscale.loggers.identity import identity

    first = identity(tmp_path, {"optim": {"lr": 1}}, state(0))
    assert first.group.startswith(tmp_path.name) and first.id == first.group
    assert identity(tmp_path, {"optim": {"lr": 1}}, state(0)) == first
    assert identity(tmp_path, {"optim": {"lr": 2}}, state(5)) == first
    assert identity(tmp_path, {"optim": {"lr": 2}}, state(0)).group != first.group


def test_settings_that_do_not_change_the_curve_exist_and_the_others_change_its_name(tmp_path: Path) -> None:
    from w2vscale.config import Config
    from w2vscale.loggers.identity import KEYS_WITHOUT_EFFECT, SECTIONS_WITHOUT_EFFECT, identity, note_start

    settings = Config().model_dump(mode="json")
    assert set(SECTIONS_WITHOUT_EFFECT) <= set(settings)
    assert all(set(keys) <= set(settings[section]) for section, keys in KEYS_WITHOUT_EFFECT.items())
    first = identity(tmp_path, settings, state(0))
    faster = settings | {"data": settings["data"] | {"workers": 1}, "logging": {}}
    changed = settings | {"optim": settings["optim"] | {"lr": 1.0}}
    assert note_start(tmp_path, faster, state(5), logged=8, named=False) is None
    assert note_start(tmp_path, changed, state(8), logged=8, named=False) is None, "a longer run, for example"
    assert identity(tmp_path, changed, state(8)) == first
    assert note_start(tmp_path, changed, state(5), logged=8, named=False) is None
    cause = note_start(tmp_path, settings, state(5), logged=8, named=False)
    assert cause == "updates 6 to 8 are logged again, with other settings"
    assert identity(tmp_path, settings, state(5)).id == f"{first.group}-restart-1"
    assert note_start(tmp_path, settings, state(5), logged=8, named=True) is not None
    assert identity(tmp_path, settings, state(5, skipped_windows=3)).id == f"{first.group}-restart-2-skipped-3"
