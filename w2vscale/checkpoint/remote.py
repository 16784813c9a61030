"""Checkpoints in an object store: one folder each with the files that it has on disk.

`train_state.json` is written last and deleted first, so a checkpoint without it does not count.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from w2vscale.checkpoint.format import (
    ABANDONED,
    FOLDER,
    LARGEST_STATE,
    STATE,
    Document,
    damages,
    decode,
    folder_name,
    set_aside,
    update_of,
)
from w2vscale.errors import UserError
from w2vscale.files import sync_folder
from w2vscale.storage.cache import local_file, local_folder
from w2vscale.storage.objects import Missing, delete, download, list_objects, read, upload, version, write
from w2vscale.storage.urls import Url

DOWNLOADED_AT_ONCE = 4  # files


class Damaged(UserError):
    """A checkpoint in the store is not what was written."""


class SetAside(UserError):
    """A checkpoint on disk was set aside or replaced while it was uploaded."""


def identity(state: bytes) -> str:
    """Identifies a checkpoint by the content of its train_state.json, which has the checksums of all other files."""
    return hashlib.sha256(state).hexdigest()


@dataclass(frozen=True)
class RemoteCheckpoints:
    """The checkpoints in the folder `url` of a store. Every method may raise UserError; none is collective."""

    url: Url

    def files(self) -> dict[int, dict[str, int]]:
        """The files of each checkpoint by its update, complete or not, with their sizes in bytes."""
        found: dict[int, dict[str, int]] = {}
        for path, size in list_objects(self.url).items():
            folder, _, name = path.partition("/")
            if FOLDER.fullmatch(folder) and _is_ours(name):
                found.setdefault(update_of(Path(folder)), {})[name] = size
        return found

    def committed(self) -> list[int]:
        """The updates of the committed checkpoints, oldest first."""
        return sorted(update for update, files in self.files().items() if STATE in files)

    def state(self, update: int) -> bytes:
        """The content of train_state.json."""
        return read(self._file(update, STATE), limit=LARGEST_STATE)

    def document(self, update: int, state: bytes) -> Document:
        """What train_state.json says. Raises Damaged if it cannot be read."""
        try:
            return decode(state, file=str(self._file(update, STATE)), folder=folder_name(update))
        except UserError as error:
            raise Damaged(str(error)) from None

    def upload(self, folder: Path) -> tuple[bytes, bool]:
        """Upload the committed checkpoint in `folder`. Returns its train_state.json, and whether it was not there yet.

        Raises SetAside if it was renamed or replaced meanwhile; it is not committed in the store then.
        """
        update = update_of(folder)
        try:
            state = (folder / STATE).read_bytes()
            files = self.document(update, state).files
            there = self.files().get(update, {})
            if STATE in there:
                old = self.state(update)
                if old == state:
                    return state, False
                if self._has(update, old, files):  # only its state is new: one write replaces it
                    write(self._file(update, STATE), state)
                    return state, True
                delete([self._file(update, STATE)])
            delete([self._file(update, name) for name in there if name not in files and name != STATE])
            for name in sorted(files):  # a store takes the parts of a large file at once
                upload(folder / name, self._file(update, name))
            if (folder / STATE).read_bytes() != state:
                raise SetAside(f"{folder}: replaced while it was uploaded")
        except OSError as error:
            raise SetAside(f"{folder}: set aside while it was uploaded ({error.strerror})") from None
        sizes = self.files().get(update, {})
        for name, facts in files.items():
            if sizes.get(name) != facts["bytes"]:
                raise UserError(
                    f"{self._file(update, name)}: has {sizes.get(name, 0)} bytes, expected {facts['bytes']}"
                )
        write(self._file(update, STATE), state)
        return state, True

    def download(self, update: int, folder: Path) -> None:
        """Download a checkpoint into `folder`, which exists, and compare its files with their checksums.

        Raises Damaged if the checkpoint is not what was written, and OSError if the files cannot be written.
        """
        where = self.url / folder_name(update)
        try:
            state = self.state(update)
            files = self.document(update, state).files
            _at_once(lambda name: download(self._file(update, name), folder / name), sorted(files))
        except Missing as error:
            raise Damaged(str(error)) from None
        if problem := next(damages(folder, files), None):
            raise Damaged(f"{where}: {problem.removeprefix(f'{folder}/')}")
        (folder / STATE).write_bytes(state)
        sync_folder(folder)

    def download_into(self, update: int, folder: Path) -> Path:
        """Download a checkpoint into a folder of checkpoints, where it gets its name once it is intact.

        One there that has its name is set aside. Raises Damaged like `download`, and UserError if the folder cannot be
        written.
        """
        final = folder / folder_name(update)
        partial = folder / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.download(update, partial)
            if os.path.lexists(final):
                set_aside(final, ABANDONED)
            partial.rename(final)
            sync_folder(folder)
        except OSError as error:
            raise UserError(f"{final}: a checkpoint cannot be downloaded: {error.strerror or error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def delete(self, update: int, files: Mapping[str, int]) -> None:
        """Delete a checkpoint, train_state.json first. What else is in its folder stays."""
        delete([self._file(update, name) for name in sorted(files, key=lambda name: name != STATE)])

    def local_copy(self, update: int) -> Path:
        """The folder of a copy of a checkpoint on this machine, which later calls share."""
        url = self.url / folder_name(update)
        marker = self._file(update, STATE)

        def fill(folder: Path) -> None:
            self.download(update, folder)

        return local_folder(url, {marker: version(marker)}, fill, name=folder_name(update))

    def _has(self, update: int, state: bytes, files: Mapping[str, object]) -> bool:
        try:
            return self.document(update, state).files == files
        except Damaged:
            return False

    def _file(self, update: int, name: str) -> Url:
        return self.url / folder_name(update) / name


def local_model(place: Path | Url, log: Callable[[str], None] = lambda text: None) -> Path:
    """A path itself, or a copy of what is at a URL: a checkpoint, the newest intact one of a run, or other files.

    The log names damaged checkpoints that are skipped. Raises UserError if there is nothing, or it is damaged.
    """
    if isinstance(place, Path):
        return place
    names = list_objects(place)
    if not names:
        return local_file(place)
    if STATE in names:
        parent, _, name = place.rstrip("/").rpartition("/")
        if FOLDER.fullmatch(name):
            return RemoteCheckpoints(Url(parent)).local_copy(update_of(Path(name)))
        raise UserError(f"{place}: the folder of a checkpoint has the name update_NNNNNNNN")
    for folder in (place, place / "checkpoints"):
        remote = RemoteCheckpoints(folder)
        for update in reversed(remote.committed()):
            try:
                return remote.local_copy(update)
            except Damaged as error:
                log(f"skipping unusable checkpoint: {error}")
    files = {place / name: version(place / name) for name in names if "/" not in name}
    if not files:
        raise UserError(f"{place}: holds neither an intact checkpoint nor a model")

    def fill(folder: Path) -> None:
        _at_once(lambda url: download(url, folder / url.name), [*files])

    return local_folder(place, files, fill, name=place.name)


def _is_ours(name: str) -> bool:
    """Whether a file in the folder of a checkpoint belongs to it."""
    return name in (STATE, "config.yaml") or (name.endswith(".safetensors") and "/" not in name)


def _at_once(copy: Callable[..., None], items: Sequence[str]) -> None:
    """Download several files at once. Raises the error of the first that fails."""
    with ThreadPoolExecutor(DOWNLOADED_AT_ONCE) as pool:
        for _ in pool.map(copy, items):
            pass
