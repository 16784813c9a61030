"""The lock of a run folder, between processes and on file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from w2vscale.checkpoint import lock
from w2vscale.checkpoint.lock import locked, refuse_if_locked
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import TemporaryError, UserError
from w2vscale.training.shared_folder import require_shared

FORK = multiprocessing.get_context("fork")


def hold(exp: Path, held: Event) -> None:
    with locked(exp, print):
        held.set()
        time.sleep(30)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process that holds the lock of exp/."""
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "exp", held))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def take(exp: Path, log: list[str] | None = None) -> None:
    with locked(exp, [].append if log is None else log.append):
        pass


def test_a_second_process_is_refused(holder: multiprocessing.process.BaseProcess, tmp_path: Path) -> None:
    expected = f"{tmp_path}/exp: in use by process {holder.pid} on {socket.gethostname()} since 20"
    for attempt in (take, refuse_if_locked):
        with pytest.raises(UserError) as caught:
            attempt(tmp_path / "exp")
        assert str(caught.value).startswith(expected)
        assert str(caught.value).endswith("; stop it first, or choose another folder")


def test_the_lock_is_still_held_after_a_look_for_it(tmp_path: Path) -> None:
    """Another run is refused then, too."""
    with locked(tmp_path, print) as held:
        require_shared(tmp_path, Ranks(), held)
        with FORK.Pool(1) as pool, pytest.raises(UserError, match="in use by"):
            pool.apply(refuse_if_locked, (tmp_path,))


def elsewhere(exp: Path) -> None:
    """Let the lock look as if a process of another machine held it."""
    (exp / "lock").write_text(json.dumps({"host": "node7", "pid": 17, "since": "2026-01-01 12:00:00"}))


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(
    holder: multiprocessing.process.BaseProcess, tmp_path: Path
) -> None:
    exp, log = tmp_path / "exp", []
    elsewhere(exp)
    refuse_if_locked(exp)
    threading.Timer(1.0, holder.kill).start()
    take(exp, log)
    assert log == [
        f"{exp}: in use by process 17 on node7 since 2026-01-01 12:00:00; waiting 100 s, in case that machine is gone"
    ]


def test_a_run_on_another_machine_that_lives_is_a_reason_to_come_back(
    holder: multiprocessing.process.BaseProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.5)
    elsewhere(tmp_path / "exp")
    with pytest.raises(TemporaryError, match="in use by process 17 on node7 since 2026-01-01 12:00:00; stop it"):
        take(tmp_path / "exp")


def test_a_killed_process_holds_nothing(holder: multiprocessing.process.BaseProcess, tmp_path: Path) -> None:
    holder.kill()
    holder.join()
    assert (tmp_path / "exp" / "lock").is_file()
    refuse_if_locked(tmp_path / "exp")
    take(tmp_path / "exp")
    assert not (tmp_path / "exp" / "lock").exists()


def test_a_child_of_the_holder_does_not_hold_it(tmp_path: Path) -> None:
    """Loader processes that outlive their trainer must not keep the folder."""
    exp = tmp_path / "exp"
    with locked(exp, print):
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
    try:
        take(exp)
        refuse_if_locked(exp)
    finally:
        child.kill()
        child.join()


def test_an_empty_folder_is_not_left(tmp_path: Path) -> None:
    take(tmp_path / "a" / "b")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "exp").mkdir()
    take(tmp_path / "exp")
    assert [*tmp_path.iterdir()] == [tmp_path / "exp"]
    with locked(tmp_path / "c" / "d", print):
        (tmp_path / "c" / "d" / "file").touch()
    assert (tmp_path / "c" / "d" / "file").exists()


def test_unfinished_files_are_deleted(tmp_path: Path) -> None:
    for name in (".config.yaml.17.partial", "checkpoints/.update_00000002.partial/file", "logs/.a.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    take(tmp_path)
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b'{"pid": "x", "host": []}', b"\xff\xfe", b"[" * 100_000])
def test_any_content_of_the_file_is_overwritten(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path, print):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_link_does_not_lead_to_another_file(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not lose me")
    (tmp_path / "exp").mkdir()
    for target in (precious, tmp_path / "new"):
        (tmp_path / "exp" / "lock").unlink(missing_ok=True)
        (tmp_path / "exp" / "lock").symlink_to(target)
        refuse_if_locked(tmp_path / "exp")
        with pytest.raises(UserError, match="exp/lock: not a file of w2vscale; delete it"):
            take(tmp_path / "exp")
    assert precious.read_text() == "do not lose me"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lock")
    refuse_if_locked(tmp_path)
    with pytest.raises(UserError, match="/lock: not a file of w2vscale; delete it"):
        take(tmp_path)


def test_a_deleted_lock_is_noticed(tmp_path: Path) -> None:
    """By hand, to start a second run on the same folder."""
    with locked(tmp_path, print) as lock:
        lock.require()
        (tmp_path / "lock").unlink()
        with pytest.raises(UserError, match="/lock: deleted while this process held it"):
            lock.require()
        with locked(tmp_path, print):
            with pytest.raises(UserError, match="/lock: deleted while this process held it"):
                lock.require()
            (tmp_path / "lock").rename(tmp_path / "of-the-second")
        (tmp_path / "of-the-second").rename(tmp_path / "lock")
    assert (tmp_path / "lock").exists()  # that of the second run is left


class TestWithoutLocks:
    """A file system that has none."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lockf(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", lockf)
        monkeypatch.setattr(lock, "PATIENCE", 0.0)

    def test_it_is_said(self, tmp_path: Path) -> None:
        log: list[str] = []
        take(tmp_path, log)
        assert log == [
            f"warning: {tmp_path}: the file system has no locks; make sure that no other process uses this folder"
        ]

    def test_a_process_that_runs_here_is_respected(self, tmp_path: Path) -> None:
        (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "since": "now"}))
        with pytest.raises(UserError, match=f"in use by process {os.getppid()} on "):
            take(tmp_path)

    @pytest.mark.parametrize("holder", [{"pid": 1, "host": "elsewhere"}, {"pid": 2**40}, {"pid": None}, {}])
    def test_others_are_not(self, tmp_path: Path, holder: dict[str, object]) -> None:
        (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "since": "now"} | holder))
        take(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/exp: cannot be written: Not a directory"):
        take(tmp_path / "file" / "exp")
