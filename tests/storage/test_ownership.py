"""Several processes and runs on one store: only the owner writes, and only its own run is continued or deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from tests.helpers.checkpoints import SPECS, tensors
from tests.helpers.checkpoints import store as store_of
from tests.storage.test_mirror import WAIT, Run, bias, committed, running, wait_until
from w2vscale.checkpoint import owner, reader, remote
from w2vscale.checkpoint.format import STATE, TrainState, folder_name
from w2vscale.checkpoint.mirror import NOTE
from w2vscale.checkpoint.owner import process_identity
from w2vscale.checkpoint.remote import RemoteCheckpoints, identity, local_model
from w2vscale.errors import UserError
from w2vscale.storage import objects
from w2vscale.storage.objects import Unreachable, list_objects, read, write
from w2vscale.storage.urls import Url
from w2vscale.training.run import stored_settings


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Url:
    """An empty folder of a store in memory, where an owner counts as ended soon."""
    monkeypatch.setattr(reader, "expected_of", lambda config: SPECS)
    monkeypatch.setattr(owner, "LEASE", 0.2)
    monkeypatch.setattr(owner, "LOOK", 0.05)
    monkeypatch.setenv("W2VSCALE_CACHE", str(tmp_path / "cache"))
    return Url(f"memory://{uuid4().hex}/run")


class Frozen:
    """Freezes the first upload of a file, as SIGSTOP or a paused machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        first = iter([True])

        def frozen(file: Path, url: Url) -> None:
            if next(first, False):
                self.begun.set()
                assert self.released.wait(WAIT)
            objects.upload(file, url)

        monkeypatch.setattr(remote, "upload", frozen)


def take_over(folder: Path, url: Url, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that resumes from update 9, and saves 11 and 12."""
    monkeypatch.setattr(owner, "_has_ended", lambda other: False)
    other = Run(folder, url, keep_last=2)
    other.mirror.open()
    assert other.resume() == 9
    other.save(11)
    other.save(12)
    assert committed(url) == [11, 12]
    return other


def test_a_run_that_was_taken_over_in_an_upload_does_not_commit_it(
    url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "first" / "exp", url, keep_last=2) as run:
        run.save(9)
        frozen = Frozen(monkeypatch)
        run.save(10, wait=False)
        assert frozen.begun.wait(WAIT)
        with closing(take_over(tmp_path / "second" / "exp", url, monkeypatch).mirror):
            frozen.released.set()
            assert run.mirror.wait(WAIT)
            assert committed(url) == [11, 12]
            assert "taken over by process" in run.log[-1]


def test_a_run_that_was_taken_over_before_it_deletes_deletes_nothing(
    url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "first" / "exp", url) as run:
        run.save(1)
        commit = remote.write

        def taken_over(state: Url, content: bytes) -> None:
            commit(state, content)
            write(url / "owner.json", b'{"nonce": "x", "host": "elsewhere", "pid": 1, "beat": 5}')

        monkeypatch.setattr(remote, "write", taken_over)
        run.save(2)
        assert committed(url) == [1, 2]


def test_later_ones_of_another_process_stay(url: Url, tmp_path: Path) -> None:
    with running(tmp_path / "first" / "exp", url, keep_last=2) as run:
        run.save(1)
        whole = tmp_path / "first" / "exp" / "checkpoints" / folder_name(1)
        for file in whole.iterdir():
            objects.upload(file, url / folder_name(5) / file.name)
        run.save(2)
        run.save(3)
        assert committed(url) == [2, 3, 5]


def test_a_closed_mirror_commits_nothing_and_has_not_ended_yet(
    url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2vscale.checkpoint.mirror.STOPPING", 0.1)
    with running(tmp_path, url, keep_last=2) as run:
        run.save(9)
        frozen = Frozen(monkeypatch)
        run.save(10, wait=False)
        assert frozen.begun.wait(WAIT)
    assert json.loads(read(url / "owner.json", limit=10_000))["ended"] is False
    assert "the last checkpoint is not in checkpoint.store yet" in run.log[-1]
    frozen.released.set()
    assert run.mirror.wait(WAIT)
    assert committed(url) == [9]


@pytest.mark.parametrize("update", [7, 50])
def test_the_store_of_another_run_is_refused(update: int, url: Url, tmp_path: Path) -> None:
    with running(tmp_path / "first" / "exp", url, keep_last=2) as run:
        run.save(1)
        run.save(20)
    own = store_of(tmp_path / "second" / "exp" / "checkpoints")
    own.save(tensors(7.0), TrainState(update=update), "model: {}\n")
    with pytest.raises(UserError, match="holds another run than") as caught, running(tmp_path / "second" / "exp", url):
        pass
    assert "\n" not in str(caught.value) and str(tmp_path / "second" / "exp") in str(caught.value)
    assert not (tmp_path / "second" / "exp" / "checkpoints" / NOTE).exists()
    assert committed(url) == [1, 20]


def test_a_run_that_began_without_a_store_is_uploaded(url: Url, tmp_path: Path) -> None:
    store_of(tmp_path / "checkpoints").save(tensors(7.0), TrainState(update=7), "model: {}\n")
    for _ in range(2):
        with running(tmp_path, url) as run:
            assert run.resume() == 7
            assert run.mirror.wait(WAIT)
    assert committed(url) == [7]


def test_a_copied_folder_is_another_owner(url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.02)
    monkeypatch.setattr(owner, "LEASE", 60.0)
    with running(tmp_path / "first" / "exp", url) as run:
        run.save(1)
        shutil.copytree(tmp_path / "first" / "exp", tmp_path / "copy" / "exp", symlinks=True)
        with pytest.raises(UserError, match="the store is in use by process"), running(tmp_path / "copy" / "exp", url):
            pass
        run.save(2)
    with running(tmp_path / "copy" / "exp", url) as copy:
        assert copy.resume() == 2


@pytest.fixture
def ended_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestEnded:
    """Whether the process of an owner has ended is only judged where it could be seen."""

    def wait_for(self, url: Url, folder: Path, about: dict[str, Any]) -> bool:
        """Whether a run waits for the owner that has written this."""
        write(url / "owner.json", json.dumps({"nonce": "x", "beat": 5, "ended": False, **about}).encode())
        with running(folder, url) as run:
            return any("waiting up to" in line for line in run.log)

    def test_one_that_was_killed_here(self, url: Url, tmp_path: Path, ended_process: int) -> None:
        assert not self.wait_for(url, tmp_path, process_identity(ended_process))

    @pytest.mark.parametrize("key", ["host", "boot", "namespace"])
    def test_one_that_cannot_be_seen(self, key: str, url: Url, tmp_path: Path, ended_process: int) -> None:
        for value in ("another", None):
            assert self.wait_for(url, tmp_path, {**process_identity(ended_process), key: value})

    def test_one_that_lives(self, url: Url, tmp_path: Path) -> None:
        assert self.wait_for(url, tmp_path, process_identity(os.getpid()))

    def test_another_process_that_has_its_id(self, url: Url, tmp_path: Path) -> None:
        about = process_identity(os.getpid())
        assert not self.wait_for(url, tmp_path, {**about, "start": about["start"] - 1})


def test_the_same_bits_after_going_back_count_again(url: Url, tmp_path: Path) -> None:
    with running(tmp_path, url, keep_last=4) as run:
        for update in (1, 2, 3, 4):
            run.save(update)
        assert run.store.find(run.log.append, tmp_path / "checkpoints" / folder_name(2)) is not None
        run.mirror.resume(2)
        run.save(3)
        run.save(4)
    assert json.loads((tmp_path / "checkpoints" / NOTE).read_text())["abandoned"] == []
    for update in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints" / folder_name(update))
    with running(tmp_path, url, keep_last=4) as run:
        assert run.resume() == 4


class TestSavedAgain:
    """A checkpoint of the same update with other files, as after a change of the settings."""

    @pytest.fixture
    def run(self, url: Url, tmp_path: Path) -> Iterator[Run]:
        with running(tmp_path, url) as run:
            run.save(1)
            yield run

    def test_the_earlier_one_stays_until_it_is_complete(
        self, run: Run, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(file: Path, target: Url) -> None:
            raise Unreachable(f"{target}: away")

        def kept() -> torch.Tensor:
            return bias(RemoteCheckpoints(url).download_into(1, tmp_path / "downloaded"))

        with monkeypatch.context() as patched:
            patched.setattr(remote, "upload", away)
            run.save(1, value=7.0, wait=False, skipped_windows=1)
            wait_until(lambda: run.mirror.failing)
            assert torch.equal(kept(), tensors(1.0)["model.bias"])
        run.mirror.hurry()
        assert run.mirror.wait(WAIT)
        assert torch.equal(kept(), tensors(7.0)["model.bias"])
        assert len(list_objects(url / folder_name(1))) == 3
        run.save(2)
        assert {name.partition("/")[0] for name in list_objects(url)} == {"owner.json", folder_name(2)}

    def test_killed_before_its_train_state_is_written(
        self, run: Run, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(target: Url, content: bytes) -> None:
            raise Unreachable(f"{target}: away")

        monkeypatch.setattr(remote, "write", killed)
        run.save(1, value=7.0, wait=False, skipped_windows=1)
        wait_until(lambda: run.mirror.failing)
        assert len(list_objects(url / folder_name(1))) == 4
        assert torch.equal(bias(local_model(url)), tensors(1.0)["model.bias"])

    def test_unchanged_files_are_not_uploaded_again(
        self, run: Run, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uploads: list[str] = []

        def recorded(file: Path, target: Url) -> None:
            uploads.append(target.name)
            objects.upload(file, target)

        monkeypatch.setattr(remote, "upload", recorded)
        run.save(1, skipped_windows=1)
        assert uploads == []
        assert b'"skipped_windows": 1' in RemoteCheckpoints(url).state(1)

    def test_a_copy_with_a_damaged_size_is_repaired(self, run: Run, url: Url, tmp_path: Path) -> None:
        write(url / folder_name(1) / "shard-00001-model-00001-of-00001.safetensors", b"short")
        run.mirror.resume(1)
        assert run.mirror.wait(WAIT)
        assert torch.equal(bias(local_model(url)), tensors(1.0)["model.bias"])


def test_settings_of_a_run_that_is_only_in_the_store(url: Url, tmp_path: Path) -> None:
    assert stored_settings(tmp_path / "empty", "auto", url) is None
    with running(tmp_path / "first" / "exp", url) as run:
        run.save(1)
        found = stored_settings(tmp_path / "empty", "auto", url)
        assert found is not None and found.read_text() == "model: {}\n"
    assert stored_settings(tmp_path / "empty", "never", url) is None


def flip_a_bit(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("flipped", "gone"), [([3], []), ([2, 3], []), ([1, 2, 3], []), ([1, 2, 3], [3])])
def test_damaged_ones_on_disk_come_from_the_store(
    flipped: list[int], gone: list[int], url: Url, tmp_path: Path
) -> None:
    with running(tmp_path, url, keep_last=3) as run:
        for update in (1, 2, 3):
            run.save(update)
    for update in flipped:
        flip_a_bit(tmp_path / "checkpoints" / folder_name(update))
    store = RemoteCheckpoints(url)
    for update in gone:
        store.delete(update, store.files()[update])
    with running(tmp_path, url, keep_last=3) as run:
        newest = 2 if gone else 3
        assert run.resume() == newest
        assert torch.equal(bias(tmp_path / "checkpoints" / folder_name(newest)), tensors(float(newest))["model.bias"])


def test_a_checkpoint_that_is_deleted_meanwhile_is_skipped(
    url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, url, keep_last=2) as run:
        run.save(1)
        run.save(2)
    listed: Callable[..., list[int]] = RemoteCheckpoints.committed

    def deleted_after(self: RemoteCheckpoints) -> list[int]:
        found = listed(self)
        self.delete(2, self.files()[2])
        return found

    monkeypatch.setattr(RemoteCheckpoints, "committed", deleted_after)
    assert local_model(url).name == folder_name(1)
    assert identity(RemoteCheckpoints(url).state(1)) and STATE in list_objects(url / folder_name(1))
