"""Work in forked processes: its order, how much is under way, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import Started
from w2vscale.corpora.parallel import Part, WorkerDied, parallel_map
from w2vscale.errors import UserError

HERE = Path("corpus")


class TestParts:
    @pytest.mark.parametrize("total", [0, 1, 5, 12, 1000])
    @pytest.mark.parametrize("count", [1, 2, 5, 7])
    def test_they_are_all_once_and_about_equal(self, total: int, count: int) -> None:
        parts = [Part.parse(f"{number}/{count}").range(total) for number in range(1, count + 1)]
        assert [number for part in parts for number in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    @pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/4/2", "1.0/2"])
    def test_another_form_is_one_line(self, text: str) -> None:
        with pytest.raises(UserError, match=f"^--part {text}: give K/N, from 1/N to N/N$"):
            Part.parse(text)


def process_ids(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


def lives(process_id: int) -> bool:
    """Whether a process runs: not even one that nobody has waited for."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(true: Callable[[], bool], *, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("jobs", [1, 2, 3])
class TestResults:
    def test_come_in_the_chunks_order(self, jobs: int) -> None:
        def square(number: int) -> int:
            time.sleep(0.002 * (number % 3))
            return number**2

        assert list(parallel_map(square, range(50), jobs=jobs, source=HERE)) == [number**2 for number in range(50)]
        assert list(parallel_map(square, [], jobs=jobs, source=HERE)) == []

    def test_few_chunks_are_taken_ahead_of_them(self, jobs: int) -> None:
        taken = 0

        def chunks() -> Iterator[int]:
            nonlocal taken
            for number in range(100):
                taken += 1
                yield number

        for done, _ in enumerate(parallel_map(abs, chunks(), jobs=jobs, source=HERE)):
            assert taken <= done + 2 * jobs + 1

    def test_an_error_is_that_of_the_first_chunk_that_has_one(self, jobs: int, started: Started) -> None:
        def refuse(number: int) -> int:
            if number in (5, 8):
                raise UserError(f"number {number}")
            return number

        results = parallel_map(refuse, range(20), jobs=jobs, source=HERE)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(UserError, match=r"^number 5$"):
            next(results)
        assert started() == []

    def test_processes_end_when_the_caller_stops_early(self, jobs: int, started: Started) -> None:
        results = parallel_map(abs, range(1000), jobs=jobs, source=HERE)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        assert started() == []


class TestProcesses:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_one_that_dies_is_one_line(self, jobs: int, started: Started) -> None:
        def crash(number: int) -> int:
            if number == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        with pytest.raises(WorkerDied, match=r"^corpus: a worker process died: .*--jobs") as caught:
            list(parallel_map(crash, range(20), jobs=jobs, source=HERE, isolate=True))
        assert "\n" not in str(caught.value)
        assert started() == []

    def sleeping(self, folder: Path) -> multiprocessing.process.BaseProcess:
        """A process, leader of its group, with two workers that have been asleep for a moment."""

        def sleep(number: int) -> None:
            (folder / str(os.getpid())).touch()
            time.sleep(120)

        def work() -> None:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a background job
            try:
                list(parallel_map(sleep, range(10), jobs=2, source=HERE))
            except KeyboardInterrupt:
                os._exit(130)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        until(lambda: len(process_ids(folder)) == 2)
        return process

    def test_a_kill_of_their_parent_ends_them(self, tmp_path: Path) -> None:
        process = self.sleeping(tmp_path)
        process.kill()
        process.join()
        until(lambda: not any(lives(worker) for worker in process_ids(tmp_path)))

    def test_control_c_ends_all(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        process = self.sleeping(tmp_path)
        os.killpg(process.pid or 0, signal.SIGINT)
        process.join(timeout=30)
        assert process.exitcode == 130
        assert not any(lives(worker) for worker in process_ids(tmp_path))
        assert capfd.readouterr().err == ""
