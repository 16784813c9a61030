"""Copies of objects on this machine: made by one process while the others wait, and again if the object changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from w2vscale.errors import UserError
from w2vscale.storage.objects import Missing, Version, download, version
from w2vscale.storage.urls import Url

VARIABLE = "W2VSCALE_CACHE"
"""Environment variable that names the folder of the copies."""


def cache_folder() -> Path:
    """The folder of all copies on this machine."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "w2vscale"


def local_file(url: Url, *, beside: Sequence[Url] = ()) -> Path:
    """A copy of an object, and of the objects `beside` it that exist. Raises Missing if the object does not."""
    versions = {url: version(url)}
    for other in beside:
        with suppress(Missing):
            versions[other] = version(other)

    def fill(folder: Path) -> None:
        for each in versions:
            download(each, folder / each.name)

    return local_folder(url, versions, fill) / url.name


def local_folder(url: Url, versions: dict[Url, Version], fill: Callable[[Path], None], *, name: str = "") -> Path:
    """The folder in the cache for these versions of what is at `url`; `fill` fills it, once.

    `name` is that of the folder itself, if it matters. Raises UserError if the cache cannot be written.
    """
    key = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:16]
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / key
    final = folder / name if name else folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                (partial / name).mkdir(parents=True)
                fill(partial / name)
                partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the copy of {url} cannot be written: {error.strerror or error}; free some space, or set "
            f"{VARIABLE} to another folder"
        ) from None
    return final


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process. Where the file system has none, two processes may both make a copy."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield
