"""Read, write, list and delete objects of a store by URL, through fsspec.

Every call has time-outs and a fixed number of attempts. Every error is a UserError of one line that names the URL;
`Unreachable` is for what may work later.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from fsspec.callbacks import Callback

from w2vscale.errors import TemporaryError, UserError
from w2vscale.storage.urls import Url, shown

ATTEMPTS = 4
FIRST_WAIT = 1.0  # seconds before the second attempt; twice as long before each further one
CONNECT_SECONDS = 10
READ_SECONDS = 60  # without a byte
CALL_SECONDS = 120.0  # for a call, and for its bytes at the rate SLOWEST
SLOWEST = 2**18  # bytes per second
READ_MOST = 2**27  # bytes for which `read` waits at the rate SLOWEST; it does not know how many it reads

T = TypeVar("T")

PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "'w2vscale[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
"""What pip has to install for a scheme."""

_S3 = {
    "config_kwargs": {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # `_attempt` repeats calls
    },
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}
"""Options of fsspec's file systems."""

VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "content_md5",
    "Content-MD5",
    "Digest",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "updated",
)

_opened: dict[tuple[int, str], _Files] = {}
"""File systems by process and scheme.

A forked process opens its own, because fsspec's thread does not live on there. Those of its parent stay in this table:
to delete one would close sockets that the parent still uses.
"""


class Missing(UserError):
    """There is no such object."""


class TooLarge(UserError):
    """An object has more bytes than are read."""


class Denied(UserError):
    """Access denied, or no credentials."""


class Unreachable(TemporaryError):
    """The store does not answer, or answers with an error of its own."""


class Version(NamedTuple):
    """The size of an object in bytes, and something that changes whenever its content does."""

    bytes: int
    tag: str


def version(url: Url) -> Version:
    """The version of an object. Raises Missing if there is none."""
    info = _attempt(url, lambda files, path: files.call("info", path))
    if info.get("type") == "directory":
        raise Missing(f"{shown(url)}: a folder, not an object")
    tags = [f"{key}={info[key]}" for key in VERSION_KEYS if info.get(key) is not None]
    return Version(int(info.get("size") or 0), " ".join(tags))


def list_objects(folder: Url, *, below: bool = True) -> dict[str, int]:
    """The sizes of all objects in a folder, and in those `below` it, by their names relative to it. Empty if none."""
    depth = {} if below else {"maxdepth": 1}

    def find(files: _Files, path: str) -> dict[str, int]:
        try:
            found: dict[str, Any] = files.call("find", path, detail=True, **depth)
        except FileNotFoundError as error:
            if "bucket" in str(error):
                raise
            found = {}
        prefix = path.rstrip("/") + "/"
        sizes = {name: int(info.get("size") or 0) for name, info in found.items()}
        return {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}

    return _attempt(folder, find)


def read(url: Url, *, limit: int) -> bytes:
    """The content of an object. Raises Missing, and TooLarge if it has more than `limit` bytes."""
    content = _attempt(url, lambda files, path: files.read(path, limit + 1))
    if len(content) > limit:
        raise TooLarge(f"{shown(url)}: has more than {limit:,} bytes, the most that is read")
    return content


def read_ranges(url: Url, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of ranges (offset, size) of an object, ascending; fewer where it ends. Adjacent ranges are one read.

    Raises Missing if there is no such object.
    """
    joined: list[list[tuple[int, int]]] = []
    for offset, size in ranges:
        if not joined or sum(joined[-1][-1]) != offset:
            joined.append([])
        joined[-1].append((offset, size))
    starts, ends = [parts[0][0] for parts in joined], [sum(parts[-1]) for parts in joined]
    total = sum(size for _, size in ranges)

    def fetch(files: _Files, path: str) -> list[bytes]:
        found = files.call("cat_ranges", [path] * len(starts), starts, ends, bytes=total)
        for one in found:
            if isinstance(one, OSError) and "range is not satisfiable" in str(one):
                raise Missing(f"{shown(url)}: ends before byte {max(ends)}")
            if isinstance(one, BaseException):
                raise one
        return list(found)

    contents = _attempt(url, fetch) if ranges else []
    return [
        content[offset - parts[0][0] : offset - parts[0][0] + size]
        for parts, content in zip(joined, contents, strict=True)
        for offset, size in parts
    ]


def write(url: Url, content: bytes, *, attempts: int = ATTEMPTS) -> None:
    """Write an object, in place of one that is there. Readers see the old or the new content, never a part."""
    _attempt(url, lambda files, path: files.call("pipe_file", path, content, bytes=len(content)), attempts=attempts)


def upload(file: Path, url: Url) -> None:
    """Copy a file into the store. Raises OSError if there is no such file."""
    size = file.stat().st_size
    _attempt(url, lambda files, path: files.call("put_file", str(file), path, bytes=size), local=file)


def download(url: Url, file: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Copy an object to a file, and call `progress` after each part of it. Raises OSError if it cannot be written."""
    size = version(url).bytes
    callback = Callback(hooks={"progress": lambda *sizes, **others: progress()})
    _attempt(
        url,
        lambda files, path: files.call("get_file", path, str(file), callback=callback, bytes=size),
        local=file,
    )


def delete(urls: Sequence[Url]) -> None:
    """Delete objects; those that do not exist any more are no error."""
    for url in urls:
        with suppress(Missing):
            _attempt(url, lambda files, path: files.call("rm_file", path))


class _Files:
    """A file system of fsspec whose calls end."""

    def __init__(self, scheme: str) -> None:
        self.wrapped = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, **OPTIONS.get(scheme, {})
        )
        if scheme in ("s3", "s3a"):
            self.wrapped.retries = 1

    def call(self, name: str, *arguments: Any, bytes: int = 0, **settings: Any) -> Any:
        """Call a method, for at most as long as `bytes` may take.

        The time-outs of botocore are not enough: before it sends an object, it waits without limit
        for the store to agree (100-continue).
        """
        if not self.wrapped.async_impl:
            return getattr(self.wrapped, name)(*arguments, **settings)
        method, seconds = getattr(self.wrapped, f"_{name}"), CALL_SECONDS + bytes / SLOWEST

        async def limited() -> Any:
            return await asyncio.wait_for(method(*arguments, **settings), seconds)

        return fsspec.asyn.sync(self.wrapped.loop, limited)

    def read(self, path: str, most: int) -> bytes:
        """The first `most` bytes of an object."""
        try:
            content: bytes = self.call("cat_file", path, start=0, end=most, bytes=READ_MOST)
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError | PermissionError | TimeoutError):
                raise
            if self.call("info", path).get("size") != 0:
                raise
            return b""  # a range of an empty object is an error
        return content


def _attempt(url: Url, call: Callable[[_Files, str], T], *, local: Path | None = None, attempts: int = ATTEMPTS) -> T:
    """Call with the file system of a URL and the path in it, again after errors that may pass."""
    for attempt in range(attempts):
        try:
            files = _file_system(url.scheme)
            return call(files, files.wrapped._strip_protocol(f"{url.scheme}{url[len(url.scheme) :]}"))
        except UserError:
            raise
        except Exception as error:  # fsspec and its libraries raise many types of errors
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if local is not None and (full or getattr(error, "filename", None) == str(local)):
                raise
            problem = _user_error(url, error)
            if attempt + 1 == attempts or not isinstance(problem, Unreachable):
                raise problem from None
        time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError


def _file_system(scheme: str) -> _Files:
    key = os.getpid(), scheme
    if key not in _opened:
        _opened.setdefault(key, _Files(scheme))
    return _opened[key]


def _user_error(url: Url, error: Exception) -> UserError:
    """One line on an error of fsspec or of a library under it."""
    where, kind = shown(url), type(error).__name__
    reason = shown(" ".join(str(error).split()))[:300] or ("no answer" if isinstance(error, TimeoutError) else kind)
    if isinstance(error, ImportError):
        package = PACKAGES.get(url.scheme)
        advice = f"pip install {package}" if package else reason
        return UserError(f"{where}: a package for {url.scheme}:// is missing or broken: {advice}")
    if isinstance(error, ValueError) and "Protocol not known" in reason:
        return UserError(f"{where}: fsspec knows no scheme {url.scheme}://")
    if isinstance(error, FileNotFoundError):
        if "specified bucket does not exist" in reason:
            return UserError(f"{where}: no such bucket; make it, or check the URL (and AWS_ENDPOINT_URL)")
        return Missing(f"{where}: no such object; check the URL (and AWS_ENDPOINT_URL)")
    if isinstance(error, PermissionError) or "Credential" in kind or "Token" in kind:
        return Denied(
            f"{where}: access denied ({reason}); give credentials, for S3 by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or the role of the machine, and check what they may do"
        )
    from_network = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "urllib3", "ssl")
    passing = isinstance(error, OSError) and error.errno != errno.EINVAL
    if (from_network and kind != "ParamValidationError") or passing or isinstance(error, TimeoutError):
        return Unreachable(
            f"{where}: the store cannot be used now, after {ATTEMPTS} attempts ({reason}); check the network and "
            "AWS_ENDPOINT_URL; the same command continues later"
        )
    return UserError(f"{where}: {kind}: {reason}")
