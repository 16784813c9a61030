"""Keeps the checkpoints of a run in an object store too: uploads them in the background, and downloads what is newer.

Lives on rank 0. A failing upload is a warning; the next checkpoint is uploaded all the same.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from w2vscale.checkpoint.format import STATE, committed, folder_name, update_of
from w2vscale.checkpoint.owner import Owner
from w2vscale.checkpoint.remote import Damaged, RemoteCheckpoints, SetAside, identity
from w2vscale.checkpoint.retention import Retention
from w2vscale.errors import UserError
from w2vscale.files import read_text, write_text
from w2vscale.storage.objects import Missing
from w2vscale.storage.urls import Url

NOTE = "store.json"
"""Name of the file for a `Note`, in the folder of checkpoints."""


@dataclass(frozen=True)
class Note:
    """What a folder of checkpoints knows of the store."""

    token: str
    """Identifies the folder as the owner of the store."""
    abandoned: list[str]
    """Identities of checkpoints that were set aside, because the run went on from an earlier one."""


class Mirror:
    """The checkpoints in `folder`, and those of the same run in the store at `url`."""

    def __init__(self, url: Url, folder: Path, retention: Retention, log: Callable[[str], None]) -> None:
        self.remote, self.folder, self.retention, self.log = RemoteCheckpoints(url), folder, retention, log
        self._note = _read_note(folder / NOTE)
        self._owner = Owner(url, self._note.token, folder.parent, log)
        self._known: dict[int, str] = {}  # identities of checkpoints in the store, by update
        self._went_on = False  # a checkpoint was saved: later ones in the store are not of this run any more
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy: Path | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="store-upload", daemon=True)

    def open(self) -> None:
        """Become the owner of the store. Raises UserError if another run is, or the store cannot be used."""
        self._save_note()
        self._owner.acquire()
        self._thread.start()

    def close(self) -> None:
        """Stop, without waiting for uploads."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()
        self._owner.release()

    @property
    def updates(self) -> list[int]:
        """The updates of the checkpoints in the store."""
        return self.remote.committed()

    def fetch(self, newest: int) -> None:
        """Download the newest intact checkpoint in the store that is newer than update `newest` of the folder.

        Those that were set aside in this folder do not count. The log names those that are skipped, and why. Raises
        UserError if the store cannot be used, or the folder not be written.
        """
        for update in reversed(self.updates):
            if update <= newest:
                break
            where = self.remote.url / folder_name(update)
            try:
                if identity(self.remote.state(update)) in self._note.abandoned:
                    self.log(f"skipping {where}: the run in {self.folder} has gone back behind it")
                    continue
                self.log(f"downloaded {where} to {self.remote.download_into(update, self.folder)}")
                return
            except (Damaged, Missing) as error:
                self.log(f"skipping unusable checkpoint: {error}")

    def resume(self, update: int) -> None:
        """Begin at a checkpoint of the folder. It is uploaded, if the store does not have it.

        Raises UserError if the store cannot be used.
        """
        for later in self.updates:
            if later > update:
                self._known[later] = identity(self.remote.state(later))
        if (path := self.folder / folder_name(update)).is_dir():
            self._offer(path)

    def abandon(self, update: int) -> None:
        """Note that checkpoints later than `update` are set aside. Comes before that, so that a kill loses nothing."""
        found = {known for later, known in self._known.items() if later > update}
        for path in committed(self.folder):
            if update_of(path) > update and (path / STATE).is_file():
                found.add(identity((path / STATE).read_bytes()))
        if found - {*self._note.abandoned}:
            self._note = replace(self._note, abandoned=sorted(found | {*self._note.abandoned}))
            self._save_note()

    def saved(self, path: Path) -> None:
        """Upload a new checkpoint of the folder. Returns at once."""
        self._went_on = True
        self._offer(path)

    def uses(self, path: Path) -> bool:
        """Whether a checkpoint is being uploaded, so that it must not be deleted."""
        with self._changed:
            return self._busy == path

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to upload, but not longer than this. Returns whether nothing is left."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._busy is None, seconds)

    def _offer(self, path: Path) -> None:
        with self._changed:
            if self._waiting not in (None, path):
                self.log(f"{self._waiting}: not uploaded, because {path.name} came before the upload began")
            self._waiting = path
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed:
                    return
                self._busy, self._waiting = self._waiting, None
                path = self._busy
            assert path is not None
            try:
                self._upload(path)
            except SetAside as error:
                self.log(str(error))
            except Exception as error:  # never the end of the run
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                self.log(f"warning: {path} is not in checkpoint.store yet: {kind}{error}")

    def _upload(self, path: Path) -> None:
        self._owner.require()
        update, began = update_of(path), time.monotonic()
        state, changed = self.remote.upload(path)
        self._known[update] = identity(state)
        if changed:
            self.log(f"uploaded {path} to {self.remote.url} in {time.monotonic() - began:.1f} s")
        self._delete_old(update)

    def _delete_old(self, uploaded: int) -> None:
        """Delete what need not be kept in the store, never the checkpoint that was just uploaded."""
        files = self.remote.files()
        whole = [update for update in files if STATE in files[update]]
        later = [update for update in whole if update > uploaded and self._is_abandoned(update)]
        kept = {update: self._validation(update) for update in whole if update not in later}
        incomplete = [update for update in files if update not in whole]
        for update in (*later, *self.retention.unneeded(kept), *incomplete):
            if update != uploaded:
                self.remote.delete(update, files[update])
                self._known.pop(update, None)

    def _is_abandoned(self, update: int) -> bool:
        return self._went_on or identity(self.remote.state(update)) in self._note.abandoned

    def _validation(self, update: int) -> dict[str, float]:
        if not self.retention.keep_best:
            return {}
        state = self.remote.state(update)
        try:
            return dict(self.remote.document(update, state).state.validation)
        except UserError:
            return {}

    def _save_note(self) -> None:
        write_text(self.folder / NOTE, json.dumps(asdict(self._note), indent=2) + "\n", durable=True)


def _read_note(path: Path) -> Note:
    with suppress(OSError, ValueError, RecursionError, TypeError):
        note = Note(**json.loads(read_text(path)))
        if isinstance(note.token, str) and isinstance(note.abandoned, list):
            return note
    return Note(uuid.uuid4().hex, [])
