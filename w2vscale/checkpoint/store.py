"""The checkpoints of a run: written under a temporary name, made durable, renamed; the older ones deleted."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from w2vscale.checkpoint.reading import (
    FORMAT,
    Checkpoint,
    FileFacts,
    TrainState,
    accept_one_process,
    committed,
    file_facts,
    newest,
    read_train_state,
    update_of,
)
from w2vscale.checkpoint.shards import Shard, assembled, shards_in
from w2vscale.distributed.process_group import Ranks, broadcast_from_main
from w2vscale.errors import UserError
from w2vscale.optim.canonical import Shapes, counted, differences

T = TypeVar("T")


class Written(NamedTuple):
    """What a rank finds in the files that it has written: sizes and checksums, and the shards in their headers."""

    files: dict[str, FileFacts]
    shards: list[dict[str, Shard]]


class CheckpointStore:
    """The checkpoints of one run. Methods are collective unless they say otherwise.

    `expected` has the name and shape of every tensor that a checkpoint must hold; nothing else is ever committed.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        expected: Shapes,
        keep_last: int = 1,
        keep_every: int = 0,
        keep_best: int = 0,
        asynchronous: bool = False,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.expected = expected
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best = keep_best
        self.log = log
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[str | None] | None = None
        if asynchronous:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            if dist.is_initialized():
                # Its collectives must not meet the training's.
                self._group = dist.new_group(backend="gloo")

    def save(self, tensors: Mapping[str, Tensor], state: TrainState, config_yaml: str) -> Path:
        """Write a checkpoint, commit it, point `latest` at it and delete what need not be kept.

        Asynchronously: a copy of `tensors`, after the checkpoint before it; returns once the copy is made.

        Raises:
            UserError: `tensors` or what was written of them is not what is expected, on any rank, or the files cannot
                be written. Older checkpoints are as they were.
        """
        began = time.perf_counter()
        self.wait()
        accept_one_process()
        final = self.folder / f"update_{state.update:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._raise_anywhere(self._refusal(tensors, final))
        self._raise_anywhere(self._on_main(lambda: _fresh_folder(partial)))
        if self._thread is not None:
            tensors = {name: _copy(tensor) for name, tensor in tensors.items()}
        stall = time.perf_counter() - began

        def write() -> str | None:
            error = self._write(tensors, partial, final, state, config_yaml)
            if error is None and self.ranks.is_main:
                waited = f", training waited {stall:.2f} s" if self._thread is not None else ""
                self.log(f"saved {final} in {time.perf_counter() - began:.2f} s{waited}")
            return error

        if self._thread is None:
            self._raise_anywhere(write())
        else:
            self._writing = self._thread.submit(write)
        return final

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, on any rank."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._raise_anywhere(writing.result())

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed on this rank: `wait` will raise. Not collective."""
        writing = self._writing
        return writing is not None and writing.done() and (writing.exception() or writing.result()) is not None

    def find(self, log: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that a run can be continued from; the log names newer ones and what is wrong with them.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        found: Checkpoint | str | None = None
        if self.ranks.is_main:
            try:
                found = newest(self.folder, log, resuming=True)
            except UserError as error:
                found = str(error)
        found = broadcast_from_main(found)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _write(
        self, tensors: Mapping[str, Tensor], partial: Path, final: Path, state: TrainState, config_yaml: str
    ) -> str | None:
        """Write and commit; returns what went wrong. Collective in the store's own group, if it has one.

        Every rank reaches every collective, whatever file fails on it.
        """
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group)
        except dcp.api.CheckpointException as failure:
            cause = next(iter(failure.failures.values()))[0]
            return f"{partial}: a checkpoint cannot be written: {cause}"
        files: dict[str, FileFacts] = {}
        shards: list[dict[str, Shard]] = []
        for written in self._on_main_from_all(_written_by(self.ranks.rank, partial), self._group):
            if isinstance(written, str):
                return f"{partial}: a checkpoint cannot be written: {written}"
            files |= written.files
            shards += written.shards
        return self._on_main(lambda: self._commit(partial, final, state, config_yaml, files, shards))

    def _refusal(self, tensors: Mapping[str, Tensor], final: Path) -> str | None:
        """Why these tensors are not what a checkpoint must hold, or None."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        problems = [*differences(shapes, self.expected)]
        problems += [
            f"{name}: is {tensor.dtype}, a checkpoint holds {torch.float32}"
            for name, tensor in tensors.items()
            if tensor.dtype != torch.float32
        ]
        return _not_committed(final, "the state to be saved is not that of the model and its optimizer", problems)

    def _check_written(self, shards: Sequence[dict[str, Shard]], final: Path) -> None:
        """Refuse files that do not hold what a checkpoint must hold."""
        tensors = assembled(shards)
        problems = [f"{name}: {fault}" for name, tensor in tensors.items() if (fault := tensor.fault())]
        problems += differences({name: tensor.shape for name, tensor in tensors.items()}, self.expected)
        if refusal := _not_committed(final, "its files do not hold every expected tensor exactly once", problems):
            raise UserError(refusal)

    def _commit(
        self,
        partial: Path,
        final: Path,
        state: TrainState,
        config_yaml: str,
        files: dict[str, FileFacts],
        shards: Sequence[dict[str, Shard]],
    ) -> None:
        self._check_written(shards, final)
        _write_durably(partial / "config.yaml", config_yaml)
        files = {**files, "config.yaml": file_facts(partial / "config.yaml")}
        document = {"format": FORMAT, **asdict(state), "ranks": self.ranks.world_size, "files": files}
        _write_durably(partial / "train_state.json", json.dumps(document, indent=2) + "\n")
        _sync_folder(partial)
        for path in committed(self.folder):
            # The same update saved again, or later ones that this run did not continue from.
            if update_of(path) >= state.update:
                _set_aside(path)
        partial.rename(final)
        _sync_folder(self.folder)
        _replace_link(self.folder / "latest", final.name)
        paths = sorted(committed(self.folder))
        best = _by_validation_loss(paths)[: self.keep_best] if self.keep_best else []
        for path in paths[: -self.keep_last]:
            if path not in best and not (self.keep_every and update_of(path) % self.keep_every == 0):
                self._delete(path)
        for path in self.folder.glob(".update_*.partial"):
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a folder; what cannot be deleted is no reason to stop: the next checkpoint tries again."""
        try:
            shutil.rmtree(path)
        except OSError as failure:
            self.log(f"{path}: cannot be deleted: {failure}")

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Run on rank 0; returns what went wrong there. Not collective."""
        if self.ranks.is_main:
            try:
                action()
            except UserError as error:
                return str(error)
            except OSError as failure:
                return f"{self.folder}: a checkpoint cannot be written: {failure}"
        return None

    def _raise_anywhere(self, error: str | None) -> None:
        """Raise the error of the lowest rank that has one, on all ranks."""
        for found in self._from_all(error):
            if found is not None:
                raise UserError(found)

    def _from_all(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value, on every rank."""
        values = [value] * self.ranks.world_size
        if self.ranks.world_size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def _on_main_from_all(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value, on rank 0, and nothing elsewhere: there may be many, and large."""
        if self.ranks.world_size == 1:
            return [value]
        values = [value] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(value, values, group=group)
        return values or []


def folder_for_one(output: Path) -> Path:
    """The folder in `output` for a checkpoint that no run made.

    Raises:
        UserError: there are checkpoints in it.
    """
    folder = output / "checkpoints"
    if committed(folder):
        raise UserError(f"{folder}: exists; choose another folder")
    return folder


def _by_validation_loss(paths: Sequence[Path]) -> list[Path]:
    """Those that were validated, the best first; of equal ones the first."""
    losses: dict[Path, float] = {}
    for path in paths:
        with suppress(UserError):  # damaged: nobody could use it
            if (loss := read_train_state(path).state.validation_loss) is not None:
                losses[path] = loss
    return sorted(losses, key=losses.__getitem__)


def _written_by(rank: int, folder: Path) -> Written | str:
    """Of the rank's own files: another machine's may not be in sight yet. Or what went wrong."""
    try:
        paths = sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
        return Written({path.name: file_facts(path) for path in paths}, [*map(shards_in, paths)])
    except (OSError, UserError) as failure:
        return str(failure)


def _not_committed(final: Path, what: str, problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    more = f" (and {counted(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
    return f"{final}: not committed: {what}: {problems[0]}{more}; the checkpoints before it are as they were"


def _copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    local = tensor.to_local().to("cpu", copy=True)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"abandoned_{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_link(link: Path, target: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)
