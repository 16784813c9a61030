"""Folders to write to: one that appears when it is complete, written by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from w2vscale.checkpoint.format import committed
from w2vscale.checkpoint.lock import hold
from w2vscale.errors import UserError
from w2vscale.files import delete, sync, writing


@contextmanager
def new_folder(path: Path, *, size: int, log: Callable[[str], None] = lambda text: None) -> Iterator[Path]:
    """Yield a folder to write to. It gets the name `path`, whole and on disk, when the block ends without an error.

    An OSError in the block counts as one of writing, so the block must turn those of reading into UserErrors. What a
    killed process has left of the folder is replaced. `size`: bytes that will be written, approximately.

    Raises UserError if the folder cannot be written, the disk has less space than `size`, `path` exists and is not an
    empty folder, or another process is writing it.
    """
    target = _target(path)
    partial, lock = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "lock"))
    with hold(lock, path, log), writing(path):
        refuse_used(path)
        if os.path.lexists(partial):
            delete(partial)
        try:
            partial.mkdir()
            if (free := shutil.disk_usage(partial).free) < size:
                raise UserError(
                    f"{path}: cannot be written: it needs {decimal(size)}, and the disk has {decimal(free)} free"
                )
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            partial.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def refuse_used(path: Path) -> None:
    """Raise UserError if `path` exists and is not an empty folder, or is the current one."""
    target = _target(path)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; choose another one")


def _target(path: Path) -> Path:
    target = path.absolute()
    if target.is_dir():  # an empty folder may be a link to one on another disk
        target = target.resolve()
    if target == Path.cwd():
        raise UserError(f"{path}: is the current folder; name a folder in it")
    return target


def folder_for_one(output: Path) -> Path:
    """The folder in `output` for a checkpoint that no run writes. A UserError if there are checkpoints in it."""
    folder = output / "checkpoints"
    if committed(folder):
        raise UserError(f"{folder}: exists; choose another folder")
    return folder
