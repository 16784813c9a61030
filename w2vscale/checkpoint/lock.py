"""The lock of a folder: one run, or one conversion, at a time writes to it.

The kernel holds it for the process (a POSIX record lock, which NFS has too), so it ends with the process, however that
ends. It also ends if the process opens the lock file a second time and closes it. The file says which process it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vscale.errors import TemporaryError, UserError
from w2vscale.files import regular, remove_partials

HELD = (errno.EAGAIN, errno.EACCES)  # another process holds the lock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has none
PATIENCE = 0.3  # seconds in which a process that was killed lets go of its lock
LONGEST = 2**16  # bytes of the file
LEASE = 100.0  # seconds in which a file server lets go of the lock of a machine that is gone (NFSv4: 90)


_own: set[tuple[int, int]] = set()
"""The lock files that this process holds."""


def refuse_if_locked(exp: Path) -> None:
    """Raise a UserError if a run on this machine uses the folder `exp`. Fast, for use before anything is imported."""
    path = exp / "lock"
    _refuse_if_own(path, exp)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = regular(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # no lock; or no right to write, which the run itself will report
            return
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in HELD:
                return
            holder = _holder(path)
        finally:
            os.close(descriptor)
        if _is_elsewhere(holder):
            return
        if time.monotonic() > deadline:
            raise _refusal(exp, holder)
        time.sleep(0.05)


@dataclass(frozen=True)
class Lock:
    """The lock in the file `path`, held by this process."""

    path: Path
    descriptor: int

    def require(self) -> None:
        """Raise a UserError if the lock, or the folder, has been deleted meanwhile."""
        with suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == os.fstat(self.descriptor).st_ino:
                return
        raise UserError(
            f"{self.path}: deleted while this process held it, so another one may use the folder; nothing is saved"
        )

    def content(self) -> bytes:
        """The content of its file."""
        return os.pread(self.descriptor, LONGEST, 0)


@contextmanager
def locked(exp: Path, log: Callable[[str], None], *, of_a_run: bool = True) -> Iterator[Lock]:
    """Hold the lock of the folder `exp` in the block; make the folder, and delete what a killed run has left in it.

    `of_a_run`: whether it is the folder of a run, in which no other process writes. If the folder is still empty at the
    end, it is deleted. Raises UserError and TemporaryError as `hold` does.
    """
    missing = [folder for folder in (exp, *exp.parents) if not folder.exists()]
    if exp.exists() and not exp.is_dir():
        raise UserError(f"{exp}: a file, not a folder; choose another one")
    if not of_a_run and _is_of_others(exp / "lock"):
        raise UserError(f"{exp / 'lock'}: not a file of w2vscale; choose another folder")
    try:
        with hold(exp / "lock", exp, log) as lock:
            if of_a_run:
                for folder in (exp, exp / "logs", exp / "checkpoints"):
                    remove_partials(folder, log)
            yield lock
    finally:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()


@contextmanager
def hold(path: Path, folder: Path, log: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock in the file `path`, for the right to write `folder`; make the folders above the file.

    Where the file system has no locks, this process is refused only if another one on the same machine is running.
    Raises UserError if another process holds the lock, or the file cannot be written. If it is held on another machine,
    which may be gone, waits for a while, and then raises TemporaryError.
    """
    _refuse_if_own(path, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path, _take(folder, path, log))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    own = _identity(os.fstat(lock.descriptor))
    _own.add(own)
    try:
        _describe(lock.descriptor)
        yield lock
    finally:
        _own.discard(own)
        with suppress(OSError, UserError):
            lock.require()
            path.unlink()
        os.close(lock.descriptor)


def _refuse_if_own(path: Path, folder: Path) -> None:
    """Raise a UserError if this process holds the lock: for the kernel it could take it a second time, and lose it."""
    with suppress(OSError):
        if _identity(os.stat(path)) in _own:
            raise UserError(f"{folder}: in use by this process, which trains there already; choose another folder")


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def _open(path: Path) -> int:
    try:
        return regular(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENXIO):
            raise UserError(f"{path}: not a file of w2vscale; delete it, and repeat the command") from None
        raise


def _take(exp: Path, path: Path, log: Callable[[str], None]) -> int:
    began, told = time.monotonic(), False
    while True:
        descriptor = _open(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(path)
            if error.errno in HELD or (error.errno in NO_LOCKS and _runs_here(holder)):
                os.close(descriptor)
                elsewhere = _is_elsewhere(holder)
                if time.monotonic() < began + (LEASE if elsewhere else PATIENCE):
                    if elsewhere and not told:
                        log(f"{exp}: in use by {_name(holder)}; waiting {LEASE:.0f} s, in case that machine is gone")
                        told = True
                    time.sleep(0.05)
                    continue
                raise _refusal(exp, holder) from None
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            log(f"warning: {exp}: the file system has no locks; make sure that no other process uses this folder")
            return descriptor
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the process that held it has just deleted it


def _describe(descriptor: int) -> None:
    """Write this process into the lock, for the message of a run that is refused."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # on a full disk; the lock holds without it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _refusal(exp: Path, holder: dict[str, Any]) -> UserError:
    kind = TemporaryError if _is_elsewhere(holder) else UserError
    return kind(f"{exp}: in use by {_name(holder)}; stop it first, or choose another folder")


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _is_elsewhere(holder: dict[str, Any]) -> bool:
    return isinstance(host := holder.get("host"), str) and host != socket.gethostname()


def _holder(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _is_of_others(path: Path) -> bool:
    """Whether a file has a content, and it is not that of a lock."""
    with suppress(OSError):
        return path.stat().st_size > 0 and "pid" not in _holder(path)
    return False


def _runs_here(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or holder.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True
