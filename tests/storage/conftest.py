"""An S3 server for all tests of a process, and an empty bucket for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.helpers.stores import environment, make_bucket, s3_server
from w2vscale.storage import objects
from w2vscale.storage.urls import Url

OPENED: dict[Any, Any] = {}
"""File systems with the credentials of the server. To make one takes a while."""


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of the server."""
    if not all(map(importlib.util.find_spec, ("s3fs", "moto", "flask"))):
        pytest.skip("s3fs or moto[server] is not installed")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server.endpoint


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Url:
    """An empty bucket, and an empty cache for copies."""
    for name, value in (environment(endpoint) | {"W2VSCALE_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "_opened", OPENED)
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    return make_bucket(f"bucket-{uuid4().hex[:8]}")
