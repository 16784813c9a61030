"""Keeps the checkpoints and metrics of a run in an object store too: uploads them in the background, and downloads what
is newer.

Lives on rank 0. A failing upload is a warning, and is tried again until it succeeds or a newer checkpoint comes.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from w2vscale.checkpoint.format import STATE, committed, folder_name, update_of
from w2vscale.checkpoint.owner import Owner, TakenOver
from w2vscale.checkpoint.remote import Damaged, RemoteCheckpoints, SetAside, identity, no_progress
from w2vscale.checkpoint.retention import Retention
from w2vscale.errors import UserError, counted
from w2vscale.files import read_text, write_text
from w2vscale.storage.objects import Missing, read, write
from w2vscale.storage.urls import Url, place

NOTE = "store.json"
"""Name of the file for a `Note`, in the folder of checkpoints."""
METRICS = "metrics.jsonl"
"""In the folder of a run, and beside its checkpoints in the store."""
MOST_METRICS = 2**30  # bytes

FIRST_PAUSE = 5.0  # seconds before a failed upload is tried again; twice as long before each further attempt
LONGEST_PAUSE = 300.0  # seconds
LAST_PAUSE = 15.0  # the longest pause once the run has ended
STOPPING = 1.0  # seconds that an upload may take to stop when the mirror is closed


class _Closed(Exception):
    """The mirror was closed during an upload."""


@dataclass(frozen=True)
class Note:
    """What a folder of checkpoints knows of the store."""

    run: str
    """Identifies the run. The store has the same id."""
    abandoned: list[str]
    """Identities of checkpoints in the store that were set aside, because the run went on from an earlier one."""
    foreign: list[str] = field(default_factory=list)
    """Identities of checkpoints that another folder has uploaded, whose run goes on in this one. They are kept."""


class Mirror:
    """The checkpoints in `folder`, and those of the same run in the store at `url`.

    `progress` is called again and again while `open` waits and `fetch` downloads.
    """

    def __init__(
        self,
        url: Url,
        folder: Path,
        retention: Retention,
        log: Callable[[str], None],
        progress: Callable[[], None] = no_progress,
    ) -> None:
        self.remote, self.folder, self.retention, self.log = RemoteCheckpoints(url, progress), folder, retention, log
        self._note = _read_note(folder / NOTE) or Note(uuid.uuid4().hex, [])
        self._owner = Owner(url, folder.parent, log)
        self._known: dict[int, str] = {}  # identities of checkpoints in the store, by update
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy: Path | None = None
        self._missing: Path | None = None  # the newest checkpoint, until it is in the store
        self._failures = 0  # uploads in a row that failed
        self._longest = LONGEST_PAUSE
        self._hurried = self._closed = False
        self._thread = threading.Thread(target=self._work, name="store-upload", daemon=True)

    def open(self, resume: str = "auto") -> None:
        """Become the owner of the store. `resume` is the option of this name: auto, never, or a path or URL.

        A folder without checkpoints continues the run in the store if the last folder of that run had the same name, as
        on a new machine, or if `resume` is a URL in the store.

        Raises UserError if another run is or was the owner, the store has checkpoints and `resume` is neither in it nor
        in the folder of the run, or the store cannot be used.
        """
        last = self._owner.wait_for_other(self.remote.progress)
        named = None if resume in ("auto", "never") else place(resume)
        if last.run is not None and last.run != self._note.run:
            self._note = self._adopt(last.run, last.folder, in_store=self._in_store(named))
        exp = self.folder.parent.resolve()
        outside = not named.resolve().is_relative_to(exp) if isinstance(named, Path) else not self._in_store(named)
        if named is not None and outside and self.updates:
            raise UserError(
                f"--resume {named}: is neither in {self.folder.parent} nor in checkpoint.store={self.remote.url}, "
                "which has checkpoints of a run; choose another checkpoint.store"
            )
        self._save_note(self._note)
        self._owner.acquire(self._note.run)
        self._thread.start()

    def _adopt(self, run: str, folder: str, *, in_store: bool) -> Note:
        """The note for the run in the store, whose last folder was `folder`. Raises UserError if it is another run."""
        url, exp = self.remote.url, os.path.abspath(self.folder.parent)
        if committed(self.folder) or any(self.folder.glob("*_update_*")):
            raise UserError(
                f"checkpoint.store={url}: holds another run than {self.folder}; choose another checkpoint.store, or "
                f"continue the run in the store with --resume {url} and an empty --exp"
            )
        if Path(folder).name == Path(exp).name:
            return Note(run, [])
        if not in_store:
            raise UserError(
                f"checkpoint.store={url}: holds the run of {folder}, and this one is in {exp}; choose another "
                f"checkpoint.store, or continue that run here with --resume {url}"
            )
        return Note(run, [], [self.remote.identity_of(update) for update in self.updates])

    def _in_store(self, named: Path | Url | None) -> bool:
        return isinstance(named, Url) and f"{named}/".startswith(f"{self.remote.url.rstrip('/')}/")

    def close(self) -> None:
        """Stop, without waiting for uploads: one that is not complete will not be committed."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(STOPPING)
            self._owner.release(ended=not self._thread.is_alive())
        if self._missing is not None:
            self.log(
                "warning: the last checkpoint is not in checkpoint.store yet; the next start uploads it "
                f"({self._missing})"
            )

    @property
    def updates(self) -> list[int]:
        """The updates of the checkpoints in the store."""
        return self.remote.committed()

    def fetch(self, newer_than: int, *, up_to: int | None = None) -> bool:
        """Download the newest intact checkpoint in the store that is newer than this update, if there is one.

        `up_to`: consider only this update and earlier ones. Those that were set aside in the folder do not count. The
        log names those that are skipped, and why. Returns whether one was downloaded. Raises UserError if the store
        cannot be used, the folder cannot be written, or none of the checkpoints in the store can be used and there is
        no older one (`newer_than` is below 0 and `up_to` None).
        """
        skipped = 0
        for update in reversed(self.updates):
            if update <= newer_than:
                break
            if up_to is not None and update > up_to:
                continue
            where = self.remote.url / folder_name(update)
            try:
                skipped += 1
                if self.remote.identity_of(update) in self._note.abandoned:
                    self.log(f"skipping {where}: the run in {self.folder} has gone back to an earlier checkpoint")
                    continue
                self.log(f"downloaded {where} to {self.remote.download_into(update, self.folder)}")
                self._download_metrics()
                return True
            except (Damaged, Missing) as error:
                self.log(f"skipping unusable checkpoint: {error}")
        if skipped and newer_than < 0 and up_to is None:
            raise UserError(
                f"checkpoint.store={self.remote.url}: none of its {counted(skipped, 'checkpoint')} can be used; choose "
                "another checkpoint.store to start a new run"
            )
        return False

    def resume(self, update: int) -> None:
        """Begin at a checkpoint of the folder. It is uploaded, if the store does not have it.

        Raises UserError if another folder has uploaded later ones, which would be lost, or the store cannot be used.
        """
        for later in self.updates:
            if later > update:
                self._known[later] = self.remote.identity_of(later)
                if self._known[later] in self._note.foreign:
                    raise UserError(
                        f"checkpoint.store={self.remote.url}: has {folder_name(later)} of another run folder; to go "
                        f"back to update {update}, choose another checkpoint.store"
                    )
        if (path := self.folder / folder_name(update)).is_dir():
            self._offer(path)

    def abandon(self, update: int) -> None:
        """Note that checkpoints later than `update` are set aside. Comes before that, so that a kill loses nothing."""
        found = {known for later, known in list(self._known.items()) if later > update}
        for path in committed(self.folder):
            if update_of(path) > update and (path / STATE).is_file():
                found.add(identity((path / STATE).read_bytes()))
        self._note_abandoned(add=found)

    def saved(self, path: Path) -> None:
        """Upload a new checkpoint of the folder. Returns at once."""
        # A run that went back and comes to the same bits has the same checkpoint again.
        self._note_abandoned(remove={identity((path / STATE).read_bytes())})
        self._offer(path)

    def uses(self, path: Path) -> bool:
        """Whether a checkpoint is being uploaded, so that it must not be deleted."""
        with self._changed:
            return self._busy == path

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to upload, but not longer than this. Returns whether nothing is left."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._busy is None, seconds)

    def hurry(self) -> None:
        """Try a failed upload again at once, and more often from now on."""
        with self._changed:
            self._longest, self._hurried = LAST_PAUSE, True
            self._changed.notify_all()

    @property
    def failing(self) -> bool:
        """Whether the last upload has failed."""
        return self._failures > 0

    @property
    def complete(self) -> bool:
        """Whether the newest checkpoint is in the store."""
        return self._missing is None

    def _offer(self, path: Path) -> None:
        with self._changed:
            if self._waiting not in (None, path):
                self.log(f"{self._waiting}: not uploaded, because {path.name} came before the upload began")
            self._waiting = self._missing = path
            self._hurried = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (path := self._next()) is not None:
            try:
                self._upload(path)
                self._failures = 0
            except SetAside as error:
                self._failures = 0
                self.log(str(error))
                self._done(path)
            except TakenOver as error:
                self._failures = 0
                self.log(f"warning: {path} is not uploaded: {error}")
            except _Closed:
                pass
            except Exception as error:  # never the end of the run
                self._failures += 1
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                self.log(f"warning: {path} is not in checkpoint.store yet: {kind}{error}")
                self._wait_again(path)
            with self._changed:
                self._busy = None
                self._changed.notify_all()

    def _next(self) -> Path | None:
        """Wait for the next checkpoint to upload. None once the mirror is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            if self._failures:
                pause = min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 16), self._longest)
                self._changed.wait_for(lambda: self._hurried or self._closed, pause)
            self._hurried = False
            if self._closed:
                return None
            self._busy, self._waiting = self._waiting, None
            return self._busy

    def _wait_again(self, path: Path) -> None:
        with self._changed:
            if self._waiting is None and not self._closed:
                self._waiting = path

    def _done(self, path: Path) -> None:
        with self._changed:
            if self._missing == path and self._waiting != path:
                self._missing = None

    def _upload(self, path: Path) -> None:
        self._require()
        update, began = update_of(path), time.monotonic()
        self._upload_metrics()  # before the checkpoint, so that none of its metrics is missing
        state, changed = self.remote.upload(path, self._require)
        self._known[update] = identity(state)
        if changed:
            self.log(f"uploaded {path} to {self.remote.url} in {time.monotonic() - began:.1f} s")
        self._done(path)
        try:
            self._delete_old(update)
        except TakenOver:
            raise
        except UserError as error:  # the next upload tries again
            self.log(f"warning: earlier checkpoints cannot be deleted in {self.remote.url}: {error}")

    def _upload_metrics(self) -> None:
        with suppress(FileNotFoundError):
            write(self.remote.url / METRICS, (self.folder.parent / METRICS).read_bytes())

    def _download_metrics(self) -> None:
        """Replace the metrics of the run by those in the store; a failure is only logged.

        The run drops those that are later than its checkpoint.
        """
        try:
            text = read(self.remote.url / METRICS, limit=MOST_METRICS).decode(errors="replace")
            write_text(self.folder.parent / METRICS, text)
        except Missing:
            pass
        except (UserError, OSError) as error:
            self.log(f"warning: the metrics so far are not downloaded: {error}")

    def _require(self) -> None:
        """Raise an error unless this process may write to the store."""
        if self._closed:
            raise _Closed
        self._owner.require()

    def _delete_old(self, uploaded: int) -> None:
        """Delete what need not be kept in the store, never the checkpoint that was just uploaded or a foreign one.

        Of later ones, only those that this run has set aside: others may be of a process that has taken over.
        """
        foreign = {*self._note.foreign}
        abandoned = {*self._note.abandoned} - foreign
        files = self.remote.files()
        whole = [update for update in files if STATE in files[update]]
        found = {update: self.remote.identity_of(update) for update in whole if abandoned or foreign}
        dropped = [update for update in whole if found.get(update) in abandoned]
        whole = [update for update in whole if found.get(update) not in foreign]
        own = [update for update in whole if update <= uploaded and update not in dropped]
        kept = {update: self._validation(update) for update in own}
        incomplete = [update for update in files if STATE not in files[update]]
        for update in (*dropped, *self.retention.unneeded(kept), *incomplete):
            if update != uploaded:
                self.remote.delete(update, files[update], self._require)
                self._known.pop(update, None)
        self._note_abandoned(remove=abandoned)  # none of them is in the store any more

    def _validation(self, update: int) -> dict[str, float]:
        if not self.retention.keep_best:
            return {}
        state = self.remote.state(update)
        try:
            return dict(self.remote.document(update, state).state.validation)
        except UserError:
            return {}

    def _note_abandoned(self, *, add: Set[str] = frozenset(), remove: Set[str] = frozenset()) -> None:
        with self._changed:
            before = {*self._note.abandoned}
            if (after := (before | add) - remove) != before:
                note = replace(self._note, abandoned=sorted(after))
                self._save_note(note)
                self._note = note

    def _save_note(self, note: Note) -> None:
        write_text(self.folder / NOTE, json.dumps(asdict(note), indent=2) + "\n", durable=True)


def _read_note(path: Path) -> Note | None:
    with suppress(OSError, ValueError, RecursionError, TypeError):
        note = Note(**json.loads(read_text(path)))
        if isinstance(note.run, str) and isinstance(note.abandoned, list) and isinstance(note.foreign, list):
            return note
    return None
