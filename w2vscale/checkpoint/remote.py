"""Checkpoints in an object store: one folder each with the files that it has on disk.

`train_state.json` is written last and deleted first, so a checkpoint without it does not count. Where a checkpoint is
saved again, files whose content has changed are beside the earlier ones: see `own_name`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch.distributed as dist

from w2vscale.checkpoint.format import (
    ABANDONED,
    FOLDER,
    LARGEST_STATE,
    STATE,
    Document,
    FileFacts,
    NewerFormat,
    damage,
    decode,
    folder_name,
    set_aside,
    update_of,
)
from w2vscale.distributed.process_group import Patience, broadcast_from_main, gather_from_ranks
from w2vscale.errors import TemporaryError, UserError
from w2vscale.files import delete as delete_path
from w2vscale.files import sync
from w2vscale.storage.cache import cache_folder, local_file, local_folder
from w2vscale.storage.objects import (
    Denied,
    Missing,
    TooLarge,
    delete,
    download,
    list_objects,
    read,
    upload,
    version,
    write,
)
from w2vscale.storage.urls import Url

DOWNLOADED_AT_ONCE = 4  # files
FAIRSEQ_SYMBOLS = "dict*.txt"
FAIRSEQ2_SYMBOLS = "*tokenizer*.model"
"""Names of the files with the symbols of CTC models, beside the models."""
_OURS = re.compile(rf"{re.escape(STATE)}|([0-9a-f]{{16}}\.)?config\.yaml|[^/]*\.safetensors")


class Damaged(UserError):
    """A checkpoint in the store is not what was written."""


class SetAside(UserError):
    """A checkpoint on disk was set aside or replaced while it was uploaded."""


def no_progress() -> None:
    """Where nobody waits for a download to go on."""


def identity(state: bytes) -> str:
    """Identifies a checkpoint by the content of its train_state.json, which has the checksums of all other files."""
    return hashlib.sha256(state).hexdigest()


@dataclass(frozen=True)
class RemoteCheckpoints:
    """The checkpoints in the folder `url` of a store. Every method may raise UserError; none is collective.

    `progress` is called again and again while a checkpoint is downloaded.
    """

    url: Url
    progress: Callable[[], None] = field(default=no_progress, compare=False)

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
        """The content of train_state.json. Raises Damaged if it is too large."""
        try:
            return read(self._file(update, STATE), limit=LARGEST_STATE)
        except TooLarge as error:
            raise Damaged(str(error)) from None

    def identity_of(self, update: int) -> str:
        """The identity of a checkpoint; "" if its train_state.json is too large."""
        with suppress(Damaged):
            return identity(self.state(update))
        return ""

    def document(self, update: int, state: bytes) -> Document:
        """What train_state.json says. Raises Damaged if it cannot be read, and NewerFormat as `decode` does."""
        try:
            return decode(state, file=str(self._file(update, STATE)), folder=folder_name(update))
        except NewerFormat:
            raise
        except UserError as error:
            raise Damaged(str(error)) from None

    def upload(self, folder: Path, require: Callable[[], None] = lambda: None) -> tuple[bytes, bool]:
        """Upload the committed checkpoint in `folder`. Returns its train_state.json, and whether anything was missing.

        One with its name in the store stays until a single write of train_state.json replaces it. `require` is called
        just before that and before each deletion, and raises an error if this process must not write any more. Raises
        SetAside if the checkpoint on disk was renamed or replaced meanwhile; it is not committed in the store then.
        """
        update = update_of(folder)
        try:
            state = (folder / STATE).read_bytes()
            files = self.document(update, state).files
            there = self.files().get(update, {})
            old = self._committed_state(update) if STATE in there else None
            names = self._names(update, files, there, old)
            missing = [name for name in sorted(files) if there.get(names[name]) != files[name]["bytes"] or old is None]
            for name in missing:  # a store takes the parts of a large file at once
                upload(folder / name, self._file(update, names[name]))
            if (folder / STATE).read_bytes() != state:
                raise SetAside(f"{folder}: replaced while it was uploaded")
        except OSError as error:
            raise SetAside(f"{folder}: set aside while it was uploaded ({error.strerror})") from None
        if old == state and not missing:
            return state, False
        there = self.files().get(update, {})
        for name, facts in files.items():
            if (size := there.get(names[name], 0)) != facts["bytes"]:
                raise UserError(f"{self._file(update, names[name])}: has {size} bytes, expected {facts['bytes']}")
        require()
        write(self._file(update, STATE), state)
        self._delete(update, [name for name in there if name not in (STATE, *names.values())], require)
        return state, True

    def _committed_state(self, update: int) -> bytes:
        with suppress(Damaged):
            return self.state(update)
        return b""

    def _names(
        self, update: int, files: Mapping[str, FileFacts], there: Mapping[str, int], old: bytes | None
    ) -> dict[str, str]:
        """The names of the objects for the files of a checkpoint, whose train_state.json in the store is `old`.

        No object that `old` lists is overwritten: a file with another content gets a name of its own.
        """
        before: Mapping[str, FileFacts] = {}
        if old is not None:
            with suppress(Damaged):
                before = self.document(update, old).files
        same = {name for name, facts in files.items() if before.get(name) == facts}
        intact = {name for name in same if there.get(stored_name(name, files[name], there)) == files[name]["bytes"]}
        return {
            name: name if old is None else stored_name(name, facts, there) if name in intact else own_name(name, facts)
            for name, facts in files.items()
        }

    def download(self, update: int, folder: Path) -> None:
        """Download a checkpoint into `folder`, which exists, and compare its files with their checksums.

        Files that the folder has already are not downloaded again; those that do not belong to the checkpoint are
        deleted. Raises Damaged if it is not what was written, and OSError if the files cannot be written.
        """

        def copy(name: str) -> None:
            if damage(folder / name, files[name]):
                download(self._file(update, names[name]), folder / name, self.progress)
                if problem := damage(folder / name, files[name]):
                    raise Damaged(f"{self._file(update, names[name])}: {problem}")
            self.progress()

        try:
            state = self.state(update)
            files = self.document(update, state).files
            there = list_objects(self.url / folder_name(update))
            names = {name: stored_name(name, facts, there) for name, facts in files.items()}
            for path in folder.iterdir():
                if path.name not in files:
                    delete_path(path)
            _at_once(copy, sorted(files))
        except Missing as error:
            raise Damaged(str(error)) from None
        (folder / STATE).write_bytes(state)
        sync(folder)

    def download_into(self, update: int, folder: Path) -> Path:
        """Download a checkpoint into a folder of checkpoints, where it gets its name once it is intact.

        One there that has its name is set aside. After an error of the store, or a kill, the next call goes on with the
        files that are complete. Raises Damaged like `download`, and UserError if the folder cannot be written.
        """
        final = folder / folder_name(update)
        partial = folder / f".{final.name}.download.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            self.download(update, partial)
            if os.path.lexists(final):
                set_aside(final, ABANDONED)
            partial.rename(final)
            sync(folder)
        except Damaged:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: a checkpoint cannot be downloaded: {error.strerror or error}") from None
        return final

    def delete(self, update: int, files: Iterable[str], require: Callable[[], None] = lambda: None) -> None:
        """Delete a checkpoint, train_state.json first. What else is in its folder stays. `require`: as in `upload`."""
        self._delete(update, sorted(files, key=lambda name: name != STATE), require)

    def _delete(self, update: int, names: Iterable[str], require: Callable[[], None]) -> None:
        for name in names:
            require()
            delete([self._file(update, name)])

    def settings(self) -> Path | None:
        """A local copy of the config.yaml of the newest checkpoint that has a readable one. None if there is none."""
        for update in reversed(self.committed()):
            with suppress(Damaged, Missing):
                facts = self.document(update, self.state(update)).files["config.yaml"]
                there = list_objects(self.url / folder_name(update))
                return local_file(self._file(update, stored_name("config.yaml", facts, there)))
        return None

    def local_copy(self, update: int) -> Path:
        """The folder of a copy of a checkpoint on this machine, which later calls share."""
        url = self.url / folder_name(update)
        marker = self._file(update, STATE)

        def fill(folder: Path) -> None:
            self.download(update, folder)

        return local_folder(url, {marker: version(marker)}, fill, name=folder_name(update))

    def _file(self, update: int, name: str) -> Url:
        return self.url / folder_name(update) / name


def local_model(place: Path | Url, log: Callable[[str], None] = lambda text: None) -> Path:
    """A path itself, or a copy of what is at a URL: a checkpoint, the newest intact one of a run, or other files.

    The log names damaged checkpoints that are skipped. Raises UserError if there is nothing, or it is damaged.
    """
    return place if isinstance(place, Path) else _find_model(place, log, no_progress)[1]


def model_on_all_ranks(
    place: Path | Url, log: Callable[[str], None] = lambda text: None, patience: Patience | None = None
) -> Path:
    """Like `local_model`, but all ranks get copies, each on its machine, of what rank 0 finds at a URL. Collective."""
    if isinstance(place, Path):
        return place
    patience = patience or Patience()

    def copy(url: Url) -> tuple[Url, Path]:
        return _find_model(url, log, patience.progress)

    is_main = not dist.is_initialized() or dist.get_rank() == 0
    found = patience.run(lambda: copy(place)[0] if is_main else None)
    url = broadcast_from_main(found)
    path = patience.run(lambda: copy(url)[1])
    # Its path in the cache tells the version of what was copied.
    if len({*gather_from_ranks(path.relative_to(cache_folder()))}) > 1:
        raise TemporaryError(f"{url}: changed while the ranks copied it; the same command starts again")
    return path


def _find_model(place: Url, log: Callable[[str], None], progress: Callable[[], None]) -> tuple[Url, Path]:
    """The URL of the checkpoint or model that a URL names, and a copy of it on this machine."""
    names = list_objects(place)
    if not names:
        return place, local_file(place, beside=_symbols_beside(place), progress=progress)
    if STATE in names:
        parent, _, name = place.rstrip("/").rpartition("/")
        if FOLDER.fullmatch(name):
            return place, RemoteCheckpoints(Url(parent), progress).local_copy(update_of(Path(name)))
        raise UserError(f"{place}: the folder of a checkpoint has the name update_NNNNNNNN")
    for folder in (place, place / "checkpoints"):
        remote = RemoteCheckpoints(folder, progress)
        for update in reversed(remote.committed()):
            try:
                return folder / folder_name(update), remote.local_copy(update)
            except (Damaged, Missing) as error:  # a run may have deleted it meanwhile
                log(f"skipping unusable checkpoint: {error}")
    files = {place / name: version(place / name) for name in names if "/" not in name}
    if not files:
        raise UserError(f"{place}: holds neither an intact checkpoint nor a model")

    def fill(folder: Path) -> None:
        _at_once(lambda url: download(url, folder / url.name, progress), [*files])

    return place, local_folder(place, files, fill, name=place.name)


def _symbols_beside(model: Url) -> list[Url]:
    """The files beside a model that may have its symbols. Empty where folders cannot be listed."""
    folder = Url(model.rstrip("/").rpartition("/")[0])
    names: Iterable[str] = ()
    if model.scheme not in ("http", "https") and "://" in folder:
        with suppress(Denied):  # the model may be all that the user is allowed to read
            names = list_objects(folder, below=False)
    patterns = (FAIRSEQ_SYMBOLS, FAIRSEQ2_SYMBOLS)
    return [folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def own_name(name: str, facts: FileFacts) -> str:
    """The name of the object for a file of a checkpoint that is saved again, with another content."""
    return f"{facts['sha256'][:16]}.{name}"


def stored_name(name: str, facts: FileFacts, there: Mapping[str, int]) -> str:
    """The name of the object that holds a file of a checkpoint, of those in its folder with these sizes."""
    own = own_name(name, facts)
    return own if there.get(own) == facts["bytes"] else name


def _is_ours(name: str) -> bool:
    """Whether a file in the folder of a checkpoint belongs to it."""
    return _OURS.fullmatch(name) is not None


def _at_once(copy: Callable[..., None], items: Sequence[str]) -> None:
    """Download several files at once. Raises the error of the first that fails."""
    with ThreadPoolExecutor(DOWNLOADED_AT_ONCE) as pool:
        for _ in pool.map(copy, items):
            pass
