"""An S3 server on the loopback address, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from w2vscale.storage import objects
from w2vscale.storage.objects import list_objects, read
from w2vscale.storage.urls import Url

SECRET = "a-secret-that-nobody-may-see"
KEY = "a-key-that-nobody-may-see"


def free_port() -> int:
    """A port of the loopback address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(endpoint: str) -> dict[str, str]:
    """The variables with which boto talks to this endpoint alone."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


class Server(NamedTuple):
    """A running server."""

    endpoint: str
    pid: int


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """An empty S3 server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120.0
        while not _answers(endpoint):
            assert server.poll() is None, (folder / "moto.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Server(endpoint, server.pid)
    finally:
        server.kill()
        server.wait()


def _answers(endpoint: str) -> bool:
    try:
        with urlopen(f"{endpoint}/moto-api/", timeout=5.0):
            return True
    except (URLError, OSError):
        return False


def make_bucket(name: str) -> Url:
    """An empty bucket."""
    objects._file_system("s3").call("mkdir", name)
    return Url(f"s3://{name}")


def contents(folder: Url) -> dict[str, bytes]:
    """All objects below a folder, by name."""
    return {name: read(folder / name, limit=2**30) for name in list_objects(folder)}
