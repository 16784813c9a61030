"""Copies of objects on this machine: made by one process while the others wait, and again if the object changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
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


def local_file(url: Url, *, beside: Sequence[Url] = (), progress: Callable[[], None] = lambda: None) -> Path:
    """A copy of an object, and of the objects `beside` it that exist. Raises Missing if the object does not."""
    versions = {url: version(url)}
    for other in beside:
        with suppress(Missing):
            versions[other] = version(other)

    def fill(folder: Path) -> None:
        for each in versions:
            download(each, folder / each.name, progress)

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
        with _locked(folder.with_name(f"{folder.name}.lock")) as locked:
            if not folder.exists():
                ours = f".{folder.name}.{socket.gethostname()}@"
                for left in folder.parent.glob(f"{ours}*.partial") if locked else ():  # by killed processes
                    shutil.rmtree(left, ignore_errors=True)
                _make(folder, folder.with_name(f"{ours}{os.getpid()}.partial"), fill, name)
    except OSError as error:
        raise UserError(
            f"{folder}: the copy of {url} cannot be written: {error.strerror or error}; free some space, or set "
            f"{VARIABLE} to another folder"
        ) from None
    return final


def _make(folder: Path, partial: Path, fill: Callable[[Path], None], name: str) -> None:
    """Fill the folder under the name `partial`, unless another process finishes it first."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / name).mkdir(parents=True)
        fill(partial / name)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with this process. Yields whether the file system has locks.

    Where it has none, several processes may make a copy, each under a name of its own.
    """
    locked = False
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
            locked = True
        yield locked
