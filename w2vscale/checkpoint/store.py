"""Writing the checkpoints of a run: under a temporary name, made durable, renamed; older ones are then deleted."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from rich.filesize import decimal
from torch import Tensor

from w2vscale.checkpoint.format import (
    ABANDONED,
    Document,
    FileFacts,
    TrainState,
    committed,
    encode,
    file_facts,
    folder_name,
    set_aside,
    update_of,
)
from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.mirror import Mirror
from w2vscale.checkpoint.opening import damage_on_any_rank
from w2vscale.checkpoint.reader import CheckpointReader, candidates
from w2vscale.checkpoint.remote import model_on_all_ranks
from w2vscale.checkpoint.retention import Retention
from w2vscale.checkpoint.slices import TensorFile, TensorSlice, assemble, faults
from w2vscale.checkpoint.writer import NotFinite, Writable, write_tensors
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.distributed.process_group import (
    Patience,
    Ranks,
    broadcast_from_main,
    errors_on_all_ranks,
)
from w2vscale.distributed.sharded import as_dtensor
from w2vscale.errors import UserError, counted
from w2vscale.files import delete, remove_partials, sync, write_text
from w2vscale.optim.canonical import Specs, differences, specs_of
from w2vscale.storage.urls import Url

T = TypeVar("T")

REPLACED = "replaced_"  # before that of one that is saved again, while the new one gets its name


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run. Methods are collective unless they say otherwise.

    `expected` describes every tensor that a checkpoint must hold; nothing else is ever committed. `keep_last`,
    `keep_every` and `keep_best` are the settings `checkpoint.*` of the same names, and `best_metric` is that of
    `trainer`. An `asynchronous` store writes in a thread. With the setting `checkpoint.store`, `mirror` on rank 0 keeps
    the checkpoints in an object store, too; `patience` runs downloads.
    """

    folder: Path
    ranks: Ranks
    _: KW_ONLY
    expected: Specs
    keep_last: int = 1
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "loss"
    asynchronous: bool = False
    mirror: Mirror | None = None
    patience: Patience = field(default_factory=Patience)
    log: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if self.asynchronous else None
        self._writing: Future[None] | None = None
        self.seconds: float | None = None  # that this rank took for the last checkpoint
        self._intact = -1  # update of the newest checkpoint that this store has written, or has found to be intact
        # A group of its own: the collectives of the thread must not meet those of the training.
        own_group = self.asynchronous and dist.is_initialized()
        self._group = dist.new_group(backend="gloo") if own_group else None
        if dist.is_initialized():  # imported now, not while the first checkpoint is written
            import w2vscale.checkpoint.sharded_writer  # noqa: F401

    def save(self, tensors: Mapping[str, Writable], state: TrainState, config_yaml: str) -> Path:
        """Write a checkpoint, commit it, point `latest` at it and delete checkpoints that need not be kept.

        Deferred tensors are made one at a time. An asynchronous store waits for the previous checkpoint, copies
        `tensors`, which is the only copy of them that is made, and returns. Lazy tensors are read one at a time, by a
        store that is neither asynchronous nor one of several ranks. Raises UserError on all ranks if on any rank
        `tensors` or the written files are not as expected, a value is not finite, or the files cannot be written. What
        was written of it is then deleted.
        """
        began = time.perf_counter()
        self.wait()
        final = self.folder / folder_name(state.update)
        partial = self.folder / f".{final.name}.partial"
        with errors_on_all_ranks():
            problems = [*differences(specs_of(tensors), self.expected)]
            _refuse(final, "the state to save does not match the model and its optimizer", problems)
        with errors_on_all_ranks(), _failing_to_write(self.folder):
            if self.ranks.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_partials(self.folder, self.log)
                self._require_space()
                partial.mkdir()
        if self._thread is not None:
            tensors = {name: _copy(x) for name, x in tensors.items() if not isinstance(x, LazyTensor)}
        stall = time.perf_counter() - began

        def write() -> None:
            try:
                self._write(tensors, partial, final, state, config_yaml)
            except UserError:
                if self.ranks.is_main:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            self.seconds = time.perf_counter() - began
            if self.ranks.is_main:
                waited = f", training waited {stall:.2f} s" if self._thread is not None else ""
                self.log(f"saved {final} in {self.seconds:.2f} s{waited}")

        if self._thread is not None:
            self._writing = self._thread.submit(write)
        else:
            with errors_on_all_ranks():
                write()
        return final

    def wait(self) -> None:
        """Wait until nothing is being written. UserError if the last checkpoint could not be written, on any rank."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with errors_on_all_ranks():
                writing.result()

    def close(self) -> None:
        """Let the thread end when nothing is being written any more, without waiting for that. Not collective."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    @property
    def newest(self) -> int:
        """Update of the newest checkpoint that this store has written or found to be intact; -1 if none."""
        return self._intact

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed on this rank, so that `wait` will raise. Not collective."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def find(
        self, log: Callable[[str], None], place: Path | Url | None = None, *, up_to: int | None = None
    ) -> CheckpointReader | None:
        """The newest checkpoint that a run can be resumed from, of the run or folder `place` (default: its own).

        The log names newer ones and why they are skipped. `up_to`: consider only this update and earlier ones. If
        `place` is a checkpoint, only this one will do. Every file is compared with its checksum, each by one rank: with
        the ranks that wrote the checkpoint, each reads its own. Of a checkpoint at a URL, each rank gets a reader of a
        copy on its machine.

        Raises UserError if there are checkpoints, and none can be used.
        """
        path = None if place is None else model_on_all_ranks(place, log, self.patience)
        if path is None and up_to is None:
            self.patience.run(self._fetch)
        found = candidates(path or self.folder, log, resuming=True, up_to=up_to)
        damaged: str | None = None
        checkpoint: CheckpointReader | None = None
        fetched: set[int] = set()

        def choose() -> CheckpointReader | None:
            """The first or next candidate, on rank 0."""
            nonlocal found, damaged
            if not self.ranks.is_main:
                return None
            if damaged is None and path is None:
                self._restore_replaced()
            if checkpoint is not None and path is None and self._fetch_instead(checkpoint, fetched):
                log(f"skipping unusable checkpoint: {damaged}")
                found, damaged = candidates(self.folder, log, resuming=True, up_to=min(fetched)), None
            return found.throw(UserError(damaged)) if damaged else next(found, None)

        while True:
            checkpoint = broadcast_from_main(self.patience.run(choose))
            if checkpoint is None:
                return None
            if path is not None and isinstance(place, Url):
                with errors_on_all_ranks():
                    checkpoint = CheckpointReader(path)
            damaged = damage_on_any_rank(checkpoint, self.patience)
            if damaged is None:
                self._intact = checkpoint.state.update
                return checkpoint

    def _write(
        self,
        tensors: Mapping[str, Writable],
        partial: Path,
        final: Path,
        state: TrainState,
        config_yaml: str,
    ) -> None:
        """Write and commit. Collective in the store's own group, if it has one.

        Every rank reaches every collective, whatever file fails on it.
        """
        try:
            write_tensors(tensors, partial, self._group)
        except NotFinite as found:
            newest = committed(self.folder)[-1:]
            advice = f"lower optim.lr and resume from {newest[0]}" if newest else "there is no earlier checkpoint"
            raise UserError(f"{final}: not committed: {found} holds values that are not finite; {advice}") from None
        files: dict[str, FileFacts] = {}
        slices: list[dict[str, TensorSlice]] = []
        for written in self._on_main_from_all(_written_by(self.ranks.rank, partial), self._group):
            if isinstance(written, str):
                raise UserError(f"{partial}: a checkpoint cannot be written: {written}")
            files |= written[0]
            slices += written[1]
        if not self.ranks.is_main:
            return
        problems = [*faults(assemble(slices), self.expected)]
        _refuse(final, "its files do not hold every expected tensor exactly once", problems)
        with _failing_to_write(self.folder):
            write_text(partial / "config.yaml", config_yaml, durable=True)
            files["config.yaml"] = file_facts(partial / "config.yaml")
            document = Document(state, files, self.ranks.world_size)
            write_text(partial / "train_state.json", encode(document), durable=True)
            sync(partial)
            self._commit(partial, final, state.update)

    def _require_space(self) -> None:
        """Raise a UserError if the disk has no space for a checkpoint."""
        needed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.expected.values())
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written: it needs {decimal(needed)}, and the disk has "
                f"{decimal(free)} free"
            )

    def _fetch(self) -> None:
        """Download a checkpoint that is newer than those in the folder, on rank 0."""
        if self.mirror is not None:
            self._restore_replaced()
            self.mirror.fetch(self._newest())

    def _fetch_instead(self, damaged: CheckpointReader, fetched: set[int]) -> bool:
        """Download a checkpoint that is newer than the next older one in the folder, in place of a damaged one.

        `fetched` are the updates for which this was tried before, and gets this one. Returns whether there was one.
        """
        update = damaged.state.update
        if self.mirror is None or update in fetched:
            return False
        fetched.add(update)
        return self.mirror.fetch(self._newest(before=update), up_to=update)

    def _newest(self, before: float = math.inf) -> int:
        """The update of the newest checkpoint in the folder that is whole, judging by headers and sizes; -1 if none.

        `before`: consider only checkpoints of earlier updates.
        """
        for path in reversed(committed(self.folder)):
            if update_of(path) >= before:
                continue
            with suppress(UserError):
                CheckpointReader(path).check(resuming=True)
                return update_of(path)
        return -1

    def _commit(self, partial: Path, final: Path, update: int) -> None:
        if self.mirror is not None:
            self.mirror.abandon(update)
        for path in reversed(committed(self.folder)):
            # Later ones, that this run was not resumed from; then the same update, which is saved again.
            if update_of(path) > update or (path == final and update != self._intact):
                set_aside(path, ABANDONED)
        replaced = None
        if final.is_dir() and not final.is_symlink():
            replaced = set_aside(final, REPLACED)
        elif os.path.lexists(final):  # something else has its name
            set_aside(final, ABANDONED)
        partial.rename(final)
        sync(self.folder)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._intact = update
        link = self.folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.folder / "latest")
        if self.mirror is not None:
            self.mirror.saved(final)
        self._delete_old()

    def _restore_replaced(self) -> None:
        """Give a checkpoint its name again if the process was killed just before the one that replaces it got it."""
        for path in self.folder.glob(f"{REPLACED}*"):
            with _failing_to_write(self.folder):
                if (named := path.with_name(path.name.removeprefix(REPLACED))).exists():
                    delete(path)
                else:
                    path.rename(named)

    def _delete_old(self) -> None:
        """Delete the checkpoints that need not be kept. A failure is only logged."""
        paths = {update_of(path): path for path in committed(self.folder)}
        keep = Retention(self.keep_last, self.keep_every, self.keep_best, self.best_metric)
        for update in keep.unneeded({update: self._validation(path) for update, path in paths.items()}):
            path = paths[update]
            if self.mirror is not None and self.mirror.uses(path):
                continue  # the next checkpoint deletes it
            try:
                shutil.rmtree(path)
            except OSError as failure:  # the next checkpoint tries again
                self.log(f"{path}: cannot be deleted: {failure}")

    def _validation(self, path: Path) -> Mapping[str, float]:
        with suppress(UserError):
            if self.keep_best:
                return CheckpointReader(path).state.validation
        return {}

    def _on_main_from_all(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value on rank 0, and an empty list on the others."""
        if self.ranks.world_size == 1:
            return [value]
        values = [value] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(value, values, group=group)
        return values or []


def _written_by(rank: int, folder: Path) -> tuple[dict[str, FileFacts], list[dict[str, TensorSlice]]] | str:
    """Read back a rank's own files, since other ranks' may not be visible on this machine yet. Or what went wrong."""
    try:
        paths = sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
        return {path.name: file_facts(path) for path in paths}, [TensorFile(path).slices for path in paths]
    except (OSError, UserError) as failure:
        return str(failure)


@contextmanager
def _failing_to_write(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise UserError(f"{folder}: a checkpoint cannot be written: {failure}") from None


def _refuse(final: Path, what: str, problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {counted(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
        raise UserError(f"{final}: not committed: {what}: {problems[0]}{more}; earlier checkpoints are unchanged")


def _copy(tensor: Tensor | DeferredTensor) -> Tensor:
    if isinstance(tensor, DeferredTensor):
        return tensor.make()
    # DTensors that are not deferred are in host memory.
    return tensor.detach().to("cpu", copy=True) if as_dtensor(tensor) is None else tensor.detach().clone()
