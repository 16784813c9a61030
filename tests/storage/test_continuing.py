"""Which run a store continues, what is refused, and that no failure of a store is worse than it has to be."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import SPECS
from tests.helpers.micro import MICRO_RUN
from tests.storage.test_mirror import WAIT, Run, committed, committed_locally, running
from w2vscale.checkpoint import mirror as mirror_module
from w2vscale.checkpoint import owner, reader, remote
from w2vscale.checkpoint.format import FORMAT, STATE, folder_name
from w2vscale.checkpoint.mirror import METRICS, NOTE
from w2vscale.checkpoint.remote import RemoteCheckpoints, local_model
from w2vscale.config import load_config
from w2vscale.distributed import process_group
from w2vscale.distributed.process_group import Patience
from w2vscale.errors import UserError
from w2vscale.files import remove_partials
from w2vscale.storage import cache, objects
from w2vscale.storage.cache import local_file
from w2vscale.storage.objects import Denied, Unreachable, write
from w2vscale.storage.urls import Url
from w2vscale.training.train import train
from w2vscale.training.watchdog import Watchdog

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Url:
    """An empty folder of a store in memory."""
    monkeypatch.setattr(reader, "expected_of", lambda config: SPECS)
    monkeypatch.setenv("W2VSCALE_CACHE", str(tmp_path / "cache"))
    return Url(f"memory://{uuid4().hex}/run")


@pytest.fixture
def base(url: Url, tmp_path: Path) -> Path:
    """The folder of a run that has uploaded updates 1 and 2."""
    with running(tmp_path / "base", url, keep_last=2) as run:
        run.save(1)
        run.save(2)
    return tmp_path / "base"


class TestAnotherFolder:
    """The store holds the run of a folder with another name."""

    def test_is_refused_and_changes_nothing(self, base: Path, url: Url, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught, running(tmp_path / "base_lr", url):
            pass
        message = str(caught.value)
        assert "\n" not in message and f"--resume {url}" in message
        assert f"{base}," in message and f"{tmp_path}/base_lr;" in message
        assert not (tmp_path / "base_lr" / "checkpoints" / NOTE).exists()
        assert committed(url) == [1, 2]

    def test_continues_it_with_its_url_and_keeps_what_it_has_not_uploaded(
        self, base: Path, url: Url, tmp_path: Path
    ) -> None:
        run = Run(tmp_path / "moved", url)
        with closing(run.mirror):
            run.mirror.open(str(url))
            found = run.store.find(run.log.append, url)
            assert found is not None and found.state.update == 2
            run.mirror.resume(2)
            run.save(3)
            run.save(4)
            assert committed(url) == [1, 2, 4]
        with running(tmp_path / "moved", url) as run:
            assert run.resume() == 4

    def test_does_not_go_back_there(self, base: Path, url: Url, tmp_path: Path) -> None:
        run = Run(tmp_path / "moved", url)
        with closing(run.mirror):
            run.mirror.open(f"{url}/{folder_name(1)}")
            assert run.store.find(run.log.append, url / folder_name(1)) is not None
            with pytest.raises(UserError, match="has update_00000002 of another run folder; to go back to update 1"):
                run.mirror.resume(1)
        assert committed(url) == [1, 2]


class TestResumingFromElsewhere:
    """--resume names a checkpoint that is neither in the folder of the run nor in its store."""

    @pytest.mark.parametrize("other", ["elsewhere/base/checkpoints/update_00000001", "memory://other/run"])
    def test_is_refused_if_the_store_has_checkpoints(self, other: str, base: Path, url: Url, tmp_path: Path) -> None:
        run = Run(tmp_path / "empty" / "base", url)
        with pytest.raises(UserError, match=r"is neither in .* nor in checkpoint\.store=") as caught:
            run.mirror.open(other)
        assert "\n" not in str(caught.value)
        assert committed(url) == [1, 2]

    def test_is_allowed_if_it_has_none(self, url: Url, tmp_path: Path) -> None:
        run = Run(tmp_path / "base", url)
        with closing(run.mirror):
            run.mirror.open("elsewhere/update_00000001")

    def test_the_own_folder_is_not_elsewhere(
        self, base: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = Run(base, url)
        with closing(run.mirror):
            run.mirror.open("base/checkpoints/update_00000001")


class TestNothingUsable:
    """No checkpoint of the store can be used."""

    def damage(self, url: Url, content: bytes) -> None:
        for update in committed(url):
            write(url / folder_name(update) / STATE, content)

    def test_no_new_run_begins(self, base: Path, url: Url, tmp_path: Path) -> None:
        self.damage(url, b"{}")
        with running(tmp_path / "empty" / "base", url) as run:
            with pytest.raises(UserError, match="none of its 2 checkpoints can be used") as caught:
                run.resume()
            assert "\n" not in str(caught.value)
            assert [line for line in run.log if line.startswith("skipping unusable")]
        with running(base, url) as run:  # whose disk is whole
            assert run.resume() == 2

    def test_a_newer_format_is_not_damage(self, base: Path, url: Url, tmp_path: Path) -> None:
        write(url / folder_name(2) / STATE, json.dumps({"format": FORMAT + 1}).encode())
        for call in (lambda: local_model(url), RemoteCheckpoints(url).settings):
            with pytest.raises(UserError, match=f"format {FORMAT + 1}; this version of w2vscale reads"):
                call()
        with running(tmp_path / "empty" / "base", url) as run, pytest.raises(UserError, match="this version of"):
            run.resume()

    def test_a_large_object_is_skipped(
        self, base: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "LARGEST_STATE", 2**14)
        write(url / folder_name(2) / STATE, bytes(2**14 + 1))
        with running(tmp_path / "empty" / "base", url, keep_last=2) as run:
            assert run.resume() == 1
            run.save(2, value=7.0)
            assert run.mirror.complete
        assert local_model(url).name == folder_name(2)


class TestDownloads:
    def test_progress_is_noted_while_waiting_and_downloading(
        self, base: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process_group, "LOOK", 0.01)
        monkeypatch.setattr(owner, "LEASE", 0.2)
        monkeypatch.setattr(owner, "LOOK", 0.05)
        monkeypatch.setattr(owner, "_has_ended", lambda other: False)
        noted: list[None] = []
        patience = Patience(lambda: noted.append(None))
        run = Run(tmp_path / "empty" / "base", url, progress=patience.progress)
        run.store.patience = patience
        with closing(run.mirror):
            patience.run(run.mirror.open)
            assert len(noted) > 3  # looks at the other owner
            before = patience._steps
            assert run.resume() == 2
            assert patience._steps >= before + 4  # parts of two files, and their checks

    def test_one_that_broke_off_goes_on_with_the_files_it_has(
        self, base: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        downloaded: list[str] = []

        def breaking(source: Url, file: Path, progress: Callable[[], None]) -> None:
            downloaded.append(file.name)
            if file.name == SHARD and not (tmp_path / "again").exists():
                raise Unreachable("away")
            objects.download(source, file, progress)

        monkeypatch.setattr(remote, "download", breaking)
        exp = tmp_path / "empty" / "base"
        with running(exp, url) as run, pytest.raises(Unreachable):
            run.resume()
        (exp / "checkpoints" / ".update_00000002.download.partial" / "another.safetensors").write_bytes(b"1")
        (tmp_path / "again").touch()
        downloaded.clear()
        with running(exp, url) as run:
            assert run.resume() == 2
        assert downloaded == [SHARD]
        assert committed_locally(exp) == [folder_name(2)]
        assert not [*(exp / "checkpoints").glob(".*.partial")]

    @pytest.mark.parametrize("locks", [True, False])
    def test_a_copy_that_another_process_finishes_meanwhile(
        self, locks: bool, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the file system has no locks, both make a copy, and neither disturbs the other."""

        def refused(*arguments: object) -> None:
            raise OSError("no locks")

        def interrupted(source: Url, file: Path, progress: Callable[[], None]) -> None:
            folders.append(file.parent)
            if len(folders) == 1:
                with monkeypatch.context() as patched:
                    patched.setattr(os, "getpid", lambda: 1)
                    others.append(local_file(url / "a"))
            objects.download(source, file, progress)

        others: list[Path] = []
        folders: list[Path] = []
        write(url / "a", b"1")
        if not locks:
            monkeypatch.setattr(cache.fcntl, "lockf", refused)
            monkeypatch.setattr(cache, "download", interrupted)
        found = local_file(url / "a")
        assert found.read_bytes() == b"1" and others == ([] if locks else [found])
        assert len({*folders}) == (0 if locks else 2)
        assert not [*found.parents[1].glob(".*.partial")]

    def test_what_killed_processes_of_this_host_left_is_deleted(self, url: Url, tmp_path: Path) -> None:
        write(url / "a", b"1")
        found = local_file(url / "a").parent
        (tmp_path / "moved").mkdir()
        found.rename(tmp_path / "moved" / "copy")
        for host in (cache.socket.gethostname(), "another"):
            (found.parent / f".{found.name}.{host}@7.partial").mkdir()
        assert local_file(url / "a").is_file()
        assert [path.name for path in found.parent.glob(".*.partial")] == [f".{found.name}.another@7.partial"]


class TestMetrics:
    def test_come_with_the_checkpoint(self, url: Url, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / METRICS).write_text("{}\n")
        with running(tmp_path / "base", url) as run:
            run.save(1)
        with running(tmp_path / "empty" / "base", url) as run:
            assert run.resume() == 1
        assert (tmp_path / "empty" / "base" / METRICS).read_text() == "{}\n"

    def test_that_cannot_be_downloaded_are_a_line(
        self, base: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(url / METRICS, b"12")
        monkeypatch.setattr(mirror_module, "MOST_METRICS", 1)
        with running(tmp_path / "empty" / "base", url) as run:
            assert run.resume() == 2
        assert [line for line in run.log if line.startswith("warning: the metrics so far are not downloaded")]


def test_an_upload_that_may_not_delete_is_complete(url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(urls: list[Url]) -> None:
        raise Denied(f"{urls[0]}: access denied")

    monkeypatch.setattr(remote, "delete", denied)
    with running(tmp_path / "base", url) as run:
        run.save(1)
        run.save(2)
        assert run.mirror.complete and not run.mirror.failing
        (warning,) = [line for line in run.log if line.startswith("warning")]
        assert warning.startswith(f"warning: earlier checkpoints cannot be deleted in {url}")


def test_a_run_that_was_taken_over_warns_at_each_checkpoint(url: Url, tmp_path: Path) -> None:
    with running(tmp_path / "base", url) as run:
        write(url / "owner.json", b'{"nonce": "x", "host": "elsewhere", "pid": 1, "beat": 5}')
        run.save(1)
        run.save(2)
        warnings = [line for line in run.log if line.startswith("warning")]
        assert [folder_name(1) in warnings[0], folder_name(2) in warnings[1], len(warnings)] == [True, True, 2]
        assert all(line.endswith("stop one of the two runs") for line in warnings)


def test_a_beat_is_written_once(url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later attempt could replace what a new owner has written meanwhile."""
    seen: list[int] = []
    monkeypatch.setattr(owner, "BEAT", 0.01)
    written: Callable[..., None] = owner.write

    def recorded(target: Url, content: bytes, *, attempts: int) -> None:
        seen.append(attempts)
        written(target, content)
        if len(seen) == 3:
            enough.set()

    enough = threading.Event()
    monkeypatch.setattr(owner, "write", recorded)
    with running(tmp_path / "base", url):
        assert enough.wait(WAIT)
    assert seen[0] == objects.ATTEMPTS and {*seen[1:]} == {1}


def test_the_note_is_not_an_unfinished_file_of_a_killed_process(tmp_path: Path) -> None:
    own, other = tmp_path / f".{NOTE}.{os.getpid()}.partial", tmp_path / f".{NOTE}.1.partial"
    own.touch()
    other.touch()
    remove_partials(tmp_path, lambda text: None)
    assert own.exists() and not other.exists()


def test_a_note_that_cannot_be_written_is_written_again(
    url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise UserError("full")

    with running(tmp_path / "base", url) as run:
        with monkeypatch.context() as patched:
            patched.setattr(mirror_module, "write_text", fail)
            with pytest.raises(UserError, match="full"):
                run.mirror._note_abandoned(add={"a"})
        run.mirror._note_abandoned(add={"a"})
    assert json.loads((tmp_path / "base" / "checkpoints" / NOTE).read_text())["abandoned"] == ["a"]


def test_a_run_tells_its_watchdog_and_starts_another(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("W2VSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(process_group, "LOOK", 0.01)
    monkeypatch.setattr(owner, "LEASE", 0.3)
    monkeypatch.setattr(owner, "LOOK", 0.02)
    places: list[tuple[str, bool]] = []
    at = Watchdog.at

    def recorded(dog: Watchdog, place: str, *, slow: bool = False) -> None:
        places.append((place, slow))
        at(dog, place, slow=slow)

    monkeypatch.setattr(Watchdog, "at", recorded)
    url = Url(f"memory://{uuid4().hex}/run")
    write(url / "owner.json", b'{"nonce": "x", "host": "elsewhere", "pid": 1, "beat": 5}')
    settings = [*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=1", "schedule.warmup_updates=1"]
    assert train(load_config("base", [*settings, f"checkpoint.store={url}"]), tmp_path / "base") == 0
    assert places.count(("reading checkpoints or their store", True)) > 5
    assert committed(url) == [1]
    assert train(load_config("base", [*settings, f"trainer.init_from={url}"]), tmp_path / "warm") == 0
    resumed = load_config("base", [*settings, "trainer.updates=2"])
    assert train(resumed, tmp_path / "resumed", resume=str(url)) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert "starting from" in printed and "at update 1" in printed
    with pytest.raises(UserError, match=f"^{url}/nothing: no such object"):
        train(resumed, tmp_path / "none", resume=f"{url}/nothing")
