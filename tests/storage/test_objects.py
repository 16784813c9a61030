"""Objects are read and written; every error is one line that names the URL and shows no secret, and nothing hangs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.helpers.stores import KEY, SECRET, free_port, make_bucket
from w2vscale.errors import TemporaryError, UserError
from w2vscale.storage import objects
from w2vscale.storage.cache import local_file
from w2vscale.storage.objects import (
    Denied,
    Missing,
    TooLarge,
    Unreachable,
    delete,
    download,
    list_objects,
    read,
    upload,
    version,
    write,
)
from w2vscale.storage.urls import Url


def error_of(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message and KEY not in message
    return caught.value


def test_what_was_written_is_read(bucket: Url, tmp_path: Path) -> None:
    write(bucket / "a" / "small", b"small")
    write(bucket / "a" / "empty", b"")
    (tmp_path / "large").write_bytes(large := os.urandom(12 << 20))
    upload(tmp_path / "large", bucket / "large")
    assert read(bucket / "a" / "small", limit=5) == b"small"
    assert read(bucket / "a" / "empty", limit=5) == b""
    download(bucket / "large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large == read(bucket / "large", limit=2**30)
    assert list_objects(bucket) == {"a/small": 5, "a/empty": 0, "large": 12 << 20}
    assert list_objects(bucket / "a") == {"small": 5, "empty": 0}
    assert list_objects(bucket / "b") == {}
    delete([bucket / "large", bucket / "never there"])
    assert "large" not in list_objects(bucket)


def test_a_version_changes_with_the_content(bucket: Url) -> None:
    write(bucket / "a", b"1")
    first = version(bucket / "a")
    assert version(bucket / "a") == first
    write(bucket / "a", b"2")
    assert version(bucket / "a") != first


def test_a_changed_file_of_a_server_without_etags_is_another_version(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="URLs of https need aiohttp, which the extra s3 brings")
    (tmp_path / "a").write_bytes(b"1")
    os.utime(tmp_path / "a", (0, 1_000_000))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = Url(f"http://127.0.0.1:{server.server_port}/a")
            first = version(url)
            assert version(url) == first
            os.utime(tmp_path / "a", (0, 2_000_000))
            assert version(url) != first
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("scheme", ["memory", "http", "s3"])
def test_listings_are_not_cached(scheme: str) -> None:
    assert objects._Files(scheme).wrapped.dircache.use_listings_cache is False


def test_the_case_of_a_scheme_does_not_matter() -> None:
    name = uuid4().hex
    write(Url(f"memory://{name}/a"), b"1")
    assert read(Url(f"Memory://{name}/a"), limit=1) == b"1"


def test_what_is_missing(bucket: Url, tmp_path: Path) -> None:
    absent, nowhere = bucket / "absent", Url("s3://no-such-bucket-anywhere/a")
    for call in (lambda: read(absent, limit=1), lambda: version(absent), lambda: download(absent, tmp_path / "a")):
        error = error_of(call)
        assert isinstance(error, Missing) and str(error).startswith(f"{absent}: no such object")
    (tmp_path / "b").write_bytes(b"b")
    for call in (
        lambda: read(nowhere, limit=1),
        lambda: write(nowhere, b""),
        lambda: upload(tmp_path / "b", nowhere),
        lambda: list_objects(nowhere),
    ):
        error = error_of(call)
        assert not isinstance(error, Missing) and str(error).startswith(f"{nowhere}: no such bucket")


def test_a_large_object_is_not_read(bucket: Url) -> None:
    write(bucket / "a", b"12345")
    assert isinstance(error_of(lambda: read(bucket / "a", limit=4)), TooLarge)


def test_without_credentials(bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(objects, "_opened", {})
    error = error_of(lambda: read(bucket / "a", limit=1))
    assert isinstance(error, Denied) and "give credentials" in str(error)


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
def test_an_endpoint_that_does_not_answer(listens: bool, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = objects._S3["config_kwargs"] | {"read_timeout": 0.2, "connect_timeout": 0.2}
    monkeypatch.setattr(objects, "CALL_SECONDS", 0.5)
    monkeypatch.setitem(objects.OPTIONS, "s3", objects._S3 | {"config_kwargs": settings})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        port = silent.getsockname()[1] if listens else free_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(objects, "_opened", {})
        for call in (
            lambda: read(bucket / "a", limit=1),
            lambda: write(bucket / "a", b""),
            lambda: list_objects(bucket),
        ):
            error = error_of(call)
            assert isinstance(error, Unreachable) and isinstance(error, TemporaryError)
            assert f"after {objects.ATTEMPTS} attempts" in str(error)


def test_an_error_that_passes_is_not_noticed(bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket / "a", b"1")
    files, failures = objects._file_system("s3").wrapped, [TimeoutError(), ConnectionResetError(), OSError(5, "I/O")]
    right = files._cat_file

    async def sometimes(*arguments: Any, **settings: Any) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(await right(*arguments, **settings))

    monkeypatch.setattr(files, "_cat_file", sometimes)
    assert read(bucket / "a", limit=1) == b"1"
    assert not failures


@pytest.mark.parametrize(("scheme", "advice"), [("s3", "pip install 'w2vscale[s3]'"), ("gs", "pip install gcsfs")])
def test_a_package_that_is_missing(scheme: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['s3fs'] = sys.modules['gcsfs'] = None\n")
    script = (
        "from w2vscale.storage.objects import read; from w2vscale.storage.urls import Url\n"
        f"try: read(Url('{scheme}://b/x'), limit=1)\nexcept ValueError as error: print(type(error).__name__, error)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith(f"UserError {scheme}://b/x: a package for {scheme}:// is missing"), done
    assert advice in done.stdout


def test_an_unknown_scheme() -> None:
    assert "fsspec knows no scheme" in str(error_of(lambda: read(Url("nonsense://b/x"), limit=1)))


class Objects(Dataset[bytes]):
    """Objects of a bucket, read by loader processes."""

    def __init__(self, bucket: Url) -> None:
        self.bucket = bucket

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> bytes:
        return read(self.bucket / str(number), limit=100)


def test_forked_loader_processes_read_after_their_parent_has(bucket: Url) -> None:
    """fsspec's thread and connections do not survive a fork. Those of the parent go on working."""
    for number in range(12):
        write(bucket / str(number), f"object {number}".encode())
    for _ in range(2):
        loader = DataLoader(Objects(bucket), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for number, content in enumerate(loader):
            assert content == f"object {number}".encode()
            assert read(bucket / str(number), limit=100) == content


class TestCopies:
    def test_a_copy_is_made_once_and_again_after_a_change(self, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
        write(bucket / "a.jsonl", b"1")
        write(bucket / "a.jsonl.index.npy", b"index")
        beside = [bucket / "a.jsonl.index.npy", bucket / "none"]
        first = local_file(bucket / "a.jsonl", beside=beside)
        assert {file.name: file.read_bytes() for file in first.parent.iterdir()} == {
            "a.jsonl": b"1", "a.jsonl.index.npy": b"index",
        }  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr("w2vscale.storage.cache.download", None)
            assert local_file(bucket / "a.jsonl", beside=beside) == first
        write(bucket / "a.jsonl.index.npy", b"other")
        second = local_file(bucket / "a.jsonl", beside=beside)
        assert second.with_name("a.jsonl.index.npy").read_bytes() == b"other"
        assert first.read_bytes() == b"1"  # others may still use it

    def test_one_process_copies_while_the_others_wait(self, bucket: Url, tmp_path: Path) -> None:
        write(bucket / "a.jsonl", os.urandom(1 << 20))
        log = tmp_path / "downloads"
        script = (
            "import sys, time\nfrom w2vscale.storage import cache\nfrom w2vscale.storage.urls import Url\n"
            "copy = cache.download\n"
            "def slow(url, file, *others):\n"
            f"    open({str(log)!r}, 'a').write('x'); time.sleep(1); copy(url, file, *others)\n"
            "cache.download = slow\n"
            f"print(cache.local_file(Url({str(bucket / 'a.jsonl')!r})))"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        started = [
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(3)
        ]
        printed = {process.communicate(timeout=120)[0] for process in started}
        assert [process.returncode for process in started] == [0, 0, 0]
        assert len(printed) == 1 and log.read_text() == "x"

    def test_an_unfinished_copy_is_made_again(self, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
        write(bucket / "a.jsonl", b"1")

        def killed(url: Url, file: Path, *others: object) -> None:
            file.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("w2vscale.storage.cache.download", killed)
            with pytest.raises(KeyboardInterrupt):
                local_file(bucket / "a.jsonl")
        assert local_file(bucket / "a.jsonl").read_bytes() == b"1"

    def test_a_cache_that_cannot_be_written(self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(bucket / "a.jsonl", b"1")
        (tmp_path / "file").touch()
        monkeypatch.setenv("W2VSCALE_CACHE", str(tmp_path / "file"))
        assert "W2VSCALE_CACHE" in str(error_of(lambda: local_file(bucket / "a.jsonl")))


def test_buckets_are_apart(bucket: Url) -> None:
    other = make_bucket(f"{bucket.name}-2")
    write(other / "a", b"")
    assert list_objects(bucket) == {}
