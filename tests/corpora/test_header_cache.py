"""The cache of headers: what it keeps through kills, damage and other folders, and one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from w2vscale.corpora.header_cache import Header, HeaderCache
from w2vscale.errors import UserError

FOLDER = Path("/audio")
HEADERS = [Header(f"s{n % 3}/{n}.wav", n, 10**18 + n, 16_000, 1, 100 * n, f"[{n}]") for n in range(9)]


def cache_at(path: Path, folder: Path = FOLDER) -> closing[HeaderCache]:
    return closing(HeaderCache(path, folder))


def files_in(path: Path) -> int:
    with cache_at(path) as cache:
        return sum(cache.get(header.file) == header for header in HEADERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "headers.sqlite"
    with cache_at(path) as cache:
        cache.add(HEADERS)
    return path


def test_headers_are_those_that_were_added_last(path: Path) -> None:
    assert files_in(path) == 9
    newer = HEADERS[4]._replace(mtime_ns=7)
    with cache_at(path) as cache:
        cache.add([newer])
        assert cache.get(newer.file) == newer
        assert cache.get("other.wav") is None
    assert files_in(path) == 8


def test_names_need_not_be_text(path: Path) -> None:
    header = Header(os.fsdecode(b"b\xffd.wav"), 1, 2, 8_000, 2, 3)
    with cache_at(path) as cache:
        cache.add([header])
        assert cache.get(header.file) == header


def test_other_files_are_removed(path: Path) -> None:
    with cache_at(path) as cache:
        cache.keep_only([header.file for header in HEADERS[:2]])
    assert files_in(path) == 2


def test_the_cache_of_another_folder_starts_empty(path: Path) -> None:
    with cache_at(path, Path("/elsewhere")) as cache:
        assert cache.get(HEADERS[0].file) is None
    assert files_in(path) == 0


@pytest.mark.parametrize("content", [b"", b"\x00" * 500, b"text\n", b"SQLite format 3\x00" + b"\x01" * 5000])
def test_another_file_is_replaced(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert files_in(path) == 0
    with cache_at(path) as cache:
        cache.add(HEADERS)
    assert files_in(path) == 9


@pytest.mark.parametrize("page", [1, 2, 3])
def test_a_damaged_cache_is_replaced(page: int, path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(bytes(4096))
    assert files_in(path) == 0


def test_one_process_at_a_time(path: Path) -> None:
    with cache_at(path), pytest.raises(UserError, match=rf"^{path}: another process is using it; wait"):
        HeaderCache(path, FOLDER)
    assert files_in(path) == 9


def test_a_full_disk_is_one_line(path: Path) -> None:
    with cache_at(path) as cache:
        pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
        cache._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match=rf"^{path}: cannot be written: database or disk is full$"):
            cache.add([Header("large.wav", 1, 1, 1, 1, 1, "x" * 100_000)])
    assert files_in(path) == 9


@pytest.mark.parametrize("milliseconds", [1, 7, 23, 61])
def test_what_was_added_survives_a_kill_at_any_moment(milliseconds: int, tmp_path: Path) -> None:
    path = tmp_path / "headers.sqlite"

    def add(report: Connection) -> None:
        with cache_at(path) as cache:
            for number in range(100_000):
                cache.add(Header(f"{number}-{n}.wav", n, n, n, n, n, "x" * 600) for n in range(8))
                report.send(number)

    fork = multiprocessing.get_context("fork")
    reports, report = fork.Pipe(duplex=False)
    process = fork.Process(target=add, args=(report,))
    process.start()
    report.close()
    assert reports.recv() == 0
    process.join(milliseconds / 1000)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    last = 0
    with suppress(EOFError):
        while True:
            last = reports.recv()
    with cache_at(path) as cache:
        assert all(cache.get(f"{number}-{n}.wav") for number in range(last + 1) for n in range(8))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM audio").fetchone()[0] in (8 * (last + 1), 8 * (last + 2))
