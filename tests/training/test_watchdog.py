"""What the watchdog concludes from the reports of the ranks. Real processes: tests/faults/test_processes.py."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from w2vscale.distributed.process_group import Ranks
from w2vscale.runtime import StopRequest
from w2vscale.training import watchdog
from w2vscale.training.watchdog import Report, Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the only element."""
    now = [100.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def dog(clock: list[float], tmp_path: Path) -> Watchdog:
    return Watchdog(Ranks(0, 0, 3), tmp_path, seconds=10.0, stop=StopRequest(), grace=60.0)


def reports(number: int, *seconds: float, allowed: float = 10.0) -> list[Report]:
    return [Report(number, f"update {rank}", one, allowed) for rank, one in enumerate(seconds)]


def test_progress_is_no_problem(dog: Watchdog, clock: list[float]) -> None:
    for number in range(1, 9):
        assert dog._judge(reports(number, 0.5, 9.9, 3.0)) is None
        clock[0] += 9.0


def test_ranks_without_progress_are_listed_longest_first(dog: Watchdog) -> None:
    assert dog._judge(reports(1, 10.2, 9.8, 12.0)) == (
        "no progress: rank 2: at update 2 for 12 s; rank 0: at update 0 for 10 s; rank 1: at update 1 for 10 s"
    )


def test_a_slow_place_has_more_time(dog: Watchdog) -> None:
    assert dog._judge(reports(1, 90.0, 90.0, 90.0, allowed=100.0)) is None
    dog.at("saving", slow=True)
    assert dog._report().allowed == 100.0
    dog.at("validation")
    assert dog._report().allowed == 10.0


def test_a_rank_whose_reports_stay_away_is_named_first(dog: Watchdog, clock: list[float]) -> None:
    first = reports(1, 1.0, 1.0, 1.0)
    assert dog._judge(first) is None
    clock[0] += 10.5
    still = [first[0]._replace(number=2), first[1], first[2]._replace(number=2)]
    assert dog._judge(still) == (
        "no progress: rank 1: not heard of for 10 s, last at update 1; rank 0: at update 0 for 1 s; "
        "rank 2: at update 2 for 1 s"
    )


def test_of_many_ranks_some_are_listed(clock: list[float], tmp_path: Path) -> None:
    dog = Watchdog(Ranks(0, 0, 20), tmp_path, seconds=10.0, stop=StopRequest(), grace=60.0)
    found = dog._judge(reports(1, *[20.0] * 20))
    assert found is not None
    assert found.count("rank ") == watchdog.SHOWN and found.endswith("; and 12 more ranks")


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with Watchdog(Ranks(), tmp_path, seconds=0.0, stop=StopRequest(), grace=60.0) as dog:
        dog._progress = dog._progress._replace(since=-1e9)
        time.sleep(3 * watchdog.TICK)
