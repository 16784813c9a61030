"""Checkpoints of a run in a store: committed last, deleted as on disk, downloaded where the disk lacks them."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import SPECS, save, tensors
from tests.helpers.checkpoints import store as store_of
from tests.helpers.stores import SECRET, contents, free_port
from w2vscale.checkpoint import owner, reader, remote
from w2vscale.checkpoint.format import STATE, TrainState, folder_name
from w2vscale.checkpoint.mirror import Mirror
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.remote import RemoteCheckpoints, local_model
from w2vscale.checkpoint.retention import Retention
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.errors import UserError
from w2vscale.storage import objects
from w2vscale.storage.objects import delete, list_objects, write
from w2vscale.storage.urls import Url

WAIT = 60.0


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of these checkpoints describe a model with two parameters."""
    monkeypatch.setattr(reader, "expected_of", lambda config: SPECS)


class Run:
    """What a run does with its checkpoints in `folder` and in the store at `url`."""

    def __init__(self, folder: Path, url: Url, *, progress: Callable[[], None] = lambda: None, **keep: Any) -> None:
        self.log: list[str] = []
        self.mirror = Mirror(url, folder / "checkpoints", Retention(**keep), self.log.append, progress)
        self.store: CheckpointStore = store_of(folder / "checkpoints", mirror=self.mirror, **keep)

    def resume(self) -> int:
        """The update at which it resumes; 0 if there is no checkpoint."""
        found = self.store.find(self.log.append)
        if found is not None:
            self.mirror.resume(found.state.update)
        return 0 if found is None else found.state.update

    def save(self, update: int, *, wait: bool = True, value: float | None = None, **state: Any) -> None:
        given = tensors(float(update) if value is None else value)
        self.store.save(given, TrainState(update=update, **state), "model: {}\n")
        assert not wait or self.mirror.wait(WAIT)


@contextmanager
def running(folder: Path, url: Url, **keep: Any) -> Iterator[Run]:
    run = Run(folder, url, **keep)
    with closing(run.mirror):
        run.mirror.open()
        yield run


def committed(url: Url) -> list[int]:
    return RemoteCheckpoints(url).committed()


def bias(folder: Path) -> torch.Tensor:
    return open_checkpoint(folder).tensor("model.bias")


def test_an_uploaded_checkpoint_is_the_one_on_disk(bucket: Url, tmp_path: Path) -> None:
    with running(tmp_path / "exp", bucket / "run") as run:
        assert run.resume() == 0
        run.save(1)
    local = {file.name: file.read_bytes() for file in (tmp_path / "exp" / "checkpoints" / folder_name(1)).iterdir()}
    assert contents(bucket / "run" / folder_name(1)) == local
    assert [line for line in run.log if line.startswith("uploaded")]
    assert not any(SECRET in line for line in run.log)


def test_a_run_goes_on_from_the_store_where_the_disk_is_empty(bucket: Url, tmp_path: Path) -> None:
    with running(tmp_path / "first" / "exp", bucket / "run") as run:
        run.save(1)
        run.save(2)
    with running(tmp_path / "second" / "exp", bucket / "run") as run:
        assert run.resume() == 2
        assert torch.equal(bias(tmp_path / "second" / "exp"), tensors(2.0)["model.bias"])
        run.save(3)
    with running(tmp_path / "first" / "exp", bucket / "run") as run:  # whose disk has update 2
        assert run.resume() == 3
    assert not list((tmp_path / "first" / "exp" / "checkpoints").glob(".*.partial"))


def test_the_marker_comes_last_and_goes_first(bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []

    def recorded(kind: str, call: Callable[..., None], name: Callable[..., list[Url]]) -> Callable[..., None]:
        def recording(*arguments: Any) -> None:
            events.extend((kind, each.name) for each in name(*arguments) if "update_" in each)
            call(*arguments)

        return recording

    monkeypatch.setattr(remote, "upload", recorded("put", objects.upload, lambda file, url: [url]))
    monkeypatch.setattr(remote, "write", recorded("put", objects.write, lambda url, content: [url]))
    monkeypatch.setattr(remote, "delete", recorded("delete", objects.delete, lambda urls: urls))
    with running(tmp_path, bucket / "run") as run:
        run.save(1)
        assert events[-1] == ("put", STATE) and len(events) == 3
        events.clear()
        run.save(2)
    deleted = [name for kind, name in events if kind == "delete"]
    assert deleted[0] == STATE and len(deleted) == 3
    assert events.index(("put", STATE)) < events.index(("delete", STATE))


def test_keeps_in_the_store_what_it_keeps_on_disk(bucket: Url, tmp_path: Path) -> None:
    losses = {1: 4.0, 2: 2.0, 3: None, 4: 2.0, 5: 3.0, 6: None, 7: 5.0}
    strange = {"update_00000001/notes.txt": b"mine", "other/x": b"mine", "update_1/train_state.json": b"{}"}
    for name, content in strange.items():
        write(bucket / "run" / name, content)
    with running(tmp_path, bucket / "run", keep_best=2, keep_every=3) as run:
        for update, loss in losses.items():
            run.save(update, validation={} if loss is None else {"loss": loss})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("update"))
    assert [folder_name(update) for update in committed(bucket / "run")] == kept
    assert committed(bucket / "run") == [2, 3, 4, 6, 7]
    found = contents(bucket / "run")
    assert all(found[name] == content for name, content in strange.items())


def test_a_damaged_one_is_skipped_and_the_next_older_used(bucket: Url, tmp_path: Path) -> None:
    with running(tmp_path / "first" / "exp", bucket / "run", keep_last=4) as run:
        for update in (1, 2, 3, 4):
            run.save(update)
    shard = "shard-00001-model-00001-of-00001.safetensors"
    content = bytearray(contents(bucket / "run" / folder_name(4))[shard])
    content[-1] ^= 1
    write(bucket / "run" / folder_name(4) / shard, bytes(content))
    delete([bucket / "run" / folder_name(3) / shard])
    write(bucket / "run" / folder_name(2) / STATE, b'{"format": 3')
    with running(tmp_path / "second" / "exp", bucket / "run", keep_last=4) as run:
        assert run.resume() == 1
    skipped = [line for line in run.log if line.startswith("skipping unusable checkpoint")]
    assert [folder_name(4) in skipped[0], folder_name(3) in skipped[1], folder_name(2) in skipped[2]] == [True] * 3
    assert local_model(bucket / "run").name == folder_name(1)


def test_a_whole_one_in_the_store_replaces_a_damaged_one_on_disk(bucket: Url, tmp_path: Path) -> None:
    with running(tmp_path, bucket / "run", keep_last=2) as run:
        run.save(1)
        run.save(2)
    next((tmp_path / "checkpoints" / folder_name(2)).glob("*.safetensors")).unlink()
    with running(tmp_path, bucket / "run", keep_last=2) as run:
        assert run.resume() == 2
    assert (tmp_path / "checkpoints" / f"abandoned_{folder_name(2)}").is_dir()


def test_an_upload_that_was_killed_does_not_count(bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with running(tmp_path / "first" / "exp", bucket / "run"):
        pass
    run = Run(tmp_path / "first" / "exp", bucket / "run")
    run.save(1, wait=False)
    path = tmp_path / "first" / "exp" / "checkpoints" / folder_name(1)
    run.mirror.remote.upload(path)
    run.save(2, wait=False)
    with monkeypatch.context() as patched:
        patched.setattr(remote, "write", killed)
        with pytest.raises(Killed):
            run.mirror.remote.upload(path.with_name(folder_name(2)))
    assert committed(bucket / "run") == [1]
    with running(tmp_path / "second" / "exp", bucket / "run") as empty:
        assert empty.resume() == 1
        assert empty.mirror.wait(WAIT)
    assert sorted({name.partition("/")[0] for name in list_objects(bucket / "run")}) == ["owner.json", folder_name(1)]
    with running(tmp_path / "first" / "exp", bucket / "run") as again:  # the next start uploads it
        assert again.resume() == 2
        assert again.mirror.wait(WAIT)
    assert committed(bucket / "run") == [2]


def test_a_failing_upload_is_tried_again(bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, bucket / "run") as run:
        run.save(1)
        with monkeypatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
            patched.setattr(objects, "_opened", {})
            run.save(2, wait=False)
            assert committed_locally(tmp_path) == [folder_name(2)]
            wait_until(lambda: run.mirror.failing)
            assert not run.mirror.wait(0.0) and not run.mirror.complete
        (warning,) = [line for line in run.log if line.startswith("warning")]
        assert "is not in checkpoint.store yet" in warning and SECRET not in warning and "\n" not in warning
        assert committed(bucket / "run") == [1]
        run.mirror.hurry()
        assert run.mirror.wait(WAIT) and run.mirror.complete and not run.mirror.failing
        assert committed(bucket / "run") == [2]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def committed_locally(exp: Path) -> list[str]:
    return sorted(path.name for path in (exp / "checkpoints").glob("update_*"))


class TestGoingBack:
    """The run goes on from an earlier checkpoint: later ones must not be taken for newer ones."""

    def test_later_ones_leave_the_store_once_the_next_is_there(self, bucket: Url, tmp_path: Path) -> None:
        with running(tmp_path, bucket / "run", keep_last=4) as run:
            for update in (1, 2, 3, 4):
                run.save(update)
            assert run.store.find(run.log.append, up_to=2) is not None
            run.save(2, skipped_windows=2)
            assert committed(bucket / "run") == [1, 2]
            assert b'"skipped_windows": 2' in RemoteCheckpoints(bucket / "run").state(2)

    @pytest.mark.parametrize("emptied", [False, True])
    def test_a_kill_before_the_next_is_uploaded(self, emptied: bool, bucket: Url, tmp_path: Path) -> None:
        with running(tmp_path, bucket / "run", keep_last=4) as run:
            for update in (1, 2, 3, 4):
                run.save(update)
        again = Run(tmp_path, bucket / "run", keep_last=4)  # which never uploads
        found = again.store.find(again.log.append, tmp_path / "checkpoints" / folder_name(2))
        assert found is not None
        again.mirror.resume(2)
        again.save(3, value=33.0, wait=False)
        if emptied:
            shutil.rmtree(tmp_path)
        lines: list[str] = []
        for _ in range(2):
            with running(tmp_path, bucket / "run", keep_last=4) as run:
                # Where the disk is lost too, the run is as if it had been killed before it went back.
                assert run.resume() == (4 if emptied else 3)
                assert run.mirror.wait(WAIT)
                lines += run.log
        assert committed(bucket / "run") == ([1, 2, 3, 4] if emptied else [1, 2, 3])
        if not emptied:
            assert any("has gone back to an earlier checkpoint" in line for line in lines)
            assert torch.equal(bias(tmp_path), tensors(33.0)["model.bias"])

    def test_from_a_downloaded_one_on_an_empty_disk(self, bucket: Url, tmp_path: Path) -> None:
        """--resume URL/update_00000002: the disk has never had updates 3 and 4."""
        with running(tmp_path / "first" / "exp", bucket / "run", keep_last=4) as run:
            for update in (1, 2, 3, 4):
                run.save(update)
        copy = local_model(bucket / "run" / folder_name(2))
        with running(tmp_path / "second" / "exp", bucket / "run", keep_last=4):
            pass
        second = Run(tmp_path / "second" / "exp", bucket / "run", keep_last=4)  # killed before it has uploaded
        assert second.store.find(second.log.append, copy) is not None
        second.mirror.resume(2)
        second.save(3, value=33.0, wait=False)
        with running(tmp_path / "second" / "exp", bucket / "run", keep_last=4) as run:
            assert run.resume() == 3
            assert run.mirror.wait(WAIT)
            assert torch.equal(bias(tmp_path / "second" / "exp"), tensors(33.0)["model.bias"])
        assert committed(bucket / "run") == [1, 2, 3]


class Held:
    """Holds uploads of files back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

        def held(file: Path, url: Url) -> None:
            self.begun.set()
            assert self.released.wait(WAIT)
            objects.upload(file, url)

        monkeypatch.setattr(remote, "upload", held)


class TestInTheBackground:
    def test_saving_does_not_wait_and_only_the_newest_waits_in_line(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = Held(monkeypatch)
        with running(tmp_path, bucket / "run") as run:
            run.save(1, wait=False)
            assert held.begun.wait(WAIT)
            for update in (2, 3, 4):
                run.save(update, wait=False)
            assert not run.mirror.wait(0.0)
            # The one that is being uploaded is not deleted, though keep_last is 1.
            assert committed_locally(tmp_path) == [folder_name(1), folder_name(4)]
            held.released.set()
            assert run.mirror.wait(WAIT)
            assert committed(bucket / "run") == [4]
        uploaded = [line for line in run.log if line.startswith("uploaded")]
        assert [folder_name(1) in uploaded[0], folder_name(4) in uploaded[1], len(uploaded)] == [True, True, 2]
        skipped = [line for line in run.log if "not uploaded, because" in line]
        assert [folder_name(2) in skipped[0], folder_name(3) in skipped[1], len(skipped)] == [True, True, 2]

    def test_one_that_is_replaced_meanwhile_is_not_committed(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = Held(monkeypatch)
        with running(tmp_path, bucket / "run") as run:
            run.save(1, wait=False)
            assert held.begun.wait(WAIT)
            run.save(1, value=7.0, wait=False, skipped_windows=1)
            held.released.set()
            assert run.mirror.wait(WAIT)
        assert any("replaced while it was uploaded" in line for line in run.log)
        assert torch.equal(bias(local_model(bucket / "run")), tensors(7.0)["model.bias"])

    def test_a_run_that_ends_does_not_wait(self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        held = Held(monkeypatch)
        with running(tmp_path, bucket / "run") as run:
            run.save(1, wait=False)
            assert held.begun.wait(WAIT)
        assert committed(bucket / "run") == []
        held.released.set()
        assert run.mirror.wait(WAIT)


class TestOwner:
    def test_a_run_that_lives_is_not_disturbed(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owner, "BEAT", 0.1)
        monkeypatch.setattr(owner, "LOOK", 0.05)
        with running(tmp_path / "first" / "exp", bucket / "run") as run:
            run.save(1)
            other = Run(tmp_path / "second" / "exp", bucket / "run")
            with pytest.raises(UserError, match="the store is in use by process") as caught:
                other.mirror.open()
            assert "\n" not in str(caught.value) and str(tmp_path / "first" / "exp") in str(caught.value)
            run.save(2)
        with running(tmp_path / "second" / "exp", bucket / "run") as run:  # it has ended
            assert run.resume() == 2

    def test_a_run_of_another_host_that_has_died_is_replaced(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owner, "LEASE", 0.3)
        monkeypatch.setattr(owner, "LOOK", 0.1)
        write(
            bucket / "run" / "owner.json", b'{"token": "x", "host": "elsewhere", "pid": 1, "beat": 5, "ended": false}'
        )
        with running(tmp_path, bucket / "run") as run:
            assert "waiting up to" in run.log[0]

    def test_a_run_that_was_replaced_uploads_nothing_more(self, bucket: Url, tmp_path: Path) -> None:
        with running(tmp_path / "first" / "exp", bucket / "run") as run:
            run.save(1)
            write(bucket / "run" / "owner.json", b'{"token": "x", "host": "elsewhere", "pid": 1, "beat": 5}')
            run.save(2)
            assert "taken over by process 1 on elsewhere" in run.log[-1]
        assert committed(bucket / "run") == [1]

    @pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{" * 10_000])
    def test_a_damaged_one_is_none(self, content: bytes, bucket: Url, tmp_path: Path) -> None:
        write(bucket / "run" / "owner.json", content)
        with running(tmp_path, bucket / "run") as run:
            run.save(1)
        assert committed(bucket / "run") == [1]


def test_models_by_url(bucket: Url, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 3)
    for file in path.iterdir():
        objects.upload(file, bucket / "runs" / "a" / "checkpoints" / path.name / file.name)
    write(bucket / "hf" / "config.json", b"{}")
    write(bucket / "hf" / "model.safetensors", b"1")
    write(bucket / "old.pt", b"pt")
    run = bucket / "runs" / "a"
    for url in (run, run / "checkpoints", run / "checkpoints" / path.name):
        assert open_checkpoint(local_model(url)).state.update == 3
    assert {file.name for file in local_model(bucket / "hf").iterdir()} == {"config.json", "model.safetensors"}
    assert local_model(bucket / "old.pt").read_bytes() == b"pt"
    for name in ("m.pt", "dict.ltr.txt", "my_tokenizer.model", "other.txt", "deeper/dict.txt"):
        write(bucket / "ctc" / name, name.encode())
    model = local_model(bucket / "ctc" / "m.pt")
    assert {path.name for path in model.parent.iterdir()} == {"m.pt", "dict.ltr.txt", "my_tokenizer.model"}
    assert model.read_bytes() == b"m.pt"
    with pytest.raises(UserError, match="no such object"):
        local_model(bucket / "nothing")
