"""Writing the checkpoints of a run: under a temporary name, made durable, renamed; older ones are then deleted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from w2vscale.checkpoint.format import Document, FileFacts, TrainState, committed, encode, file_facts, update_of
from w2vscale.checkpoint.reader import CheckpointReader, best_first, newest
from w2vscale.checkpoint.slices import TensorSlice, assemble, faults, open_tensors, slices_in
from w2vscale.distributed.process_group import Ranks, broadcast_from_main, raise_anywhere
from w2vscale.errors import UserError
from w2vscale.files import sync_folder, write_text
from w2vscale.optim.canonical import Specs, counted, differences, specs_of

T = TypeVar("T")


class Written(NamedTuple):
    """What a rank reads back from the files that it has written: sizes and checksums, and the slices of tensors."""

    files: dict[str, FileFacts]
    slices: list[dict[str, TensorSlice]]


class CheckpointStore:
    """The checkpoints of one run. Methods are collective unless they say otherwise.

    `expected` describes every tensor that a checkpoint must hold; nothing else is ever committed. `keep_last`,
    `keep_every` and `keep_best` are the settings `checkpoint.*` of the same names. An `asynchronous` store writes in a
    thread.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        expected: Specs,
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
        """Write a checkpoint, commit it, point `latest` at it and delete checkpoints that need not be kept.

        An asynchronous store waits for the previous checkpoint, copies `tensors` and returns.

        Raises:
            UserError: on any rank, `tensors` or the written files are not as expected, or the files cannot be written.
                Older checkpoints are unchanged.
        """
        began = time.perf_counter()
        self.wait()
        final = self.folder / f"update_{state.update:08d}"
        partial = self.folder / f".{final.name}.partial"
        raise_anywhere(self._refusal(tensors, final))
        raise_anywhere(self._on_main(lambda: _fresh_folder(partial)))
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
            raise_anywhere(write())
        else:
            self._writing = self._thread.submit(write)
        return final

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UserError: the last checkpoint could not be written, on any rank.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            raise_anywhere(writing.result())

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed on this rank, so that `wait` will raise. Not collective."""
        writing = self._writing
        return writing is not None and writing.done() and (writing.exception() or writing.result()) is not None

    def find(self, log: Callable[[str], None]) -> CheckpointReader | None:
        """The newest checkpoint that a run can be resumed from. The log names newer ones and why they are skipped.

        Rank 0 looks for it; the other ranks need not read any header.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        found: CheckpointReader | str | None = None
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
        if error := write_tensors(tensors, partial, self._group):
            return f"{partial}: a checkpoint cannot be written: {error}"
        files: dict[str, FileFacts] = {}
        slices: list[dict[str, TensorSlice]] = []
        for written in self._on_main_from_all(_written_by(self.ranks.rank, partial), self._group):
            if isinstance(written, str):
                return f"{partial}: a checkpoint cannot be written: {written}"
            files |= written.files
            slices += written.slices
        return self._on_main(lambda: self._commit(partial, final, state, config_yaml, files, slices))

    def _refusal(self, tensors: Mapping[str, Tensor], final: Path) -> str | None:
        """Why these tensors are not what a checkpoint must hold, or None."""
        problems = [*differences(specs_of(tensors), self.expected)]
        return _not_committed(final, "the state to save does not match the model and its optimizer", problems)

    def _check_written(self, slices: Sequence[dict[str, TensorSlice]], final: Path) -> None:
        """Refuse files that do not hold what a checkpoint must hold."""
        problems = [*faults(assemble(slices), self.expected)]
        if refusal := _not_committed(final, "its files do not hold every expected tensor exactly once", problems):
            raise UserError(refusal)

    def _commit(
        self,
        partial: Path,
        final: Path,
        state: TrainState,
        config_yaml: str,
        files: dict[str, FileFacts],
        slices: Sequence[dict[str, TensorSlice]],
    ) -> None:
        self._check_written(slices, final)
        write_text(partial / "config.yaml", config_yaml, durable=True)
        files = {**files, "config.yaml": file_facts(partial / "config.yaml")}
        document = Document(state, files, self.ranks.world_size)
        write_text(partial / "train_state.json", encode(document), durable=True)
        sync_folder(partial)
        for path in committed(self.folder):
            # The same update saved again, or later ones that this run was not resumed from.
            if update_of(path) >= state.update:
                _set_aside(path)
        partial.rename(final)
        sync_folder(self.folder)
        _replace_link(self.folder / "latest", final.name)
        self._delete_old()

    def _delete_old(self) -> None:
        """Delete the checkpoints that need not be kept, and what killed processes left."""
        paths = committed(self.folder)
        best = best_first(paths)[: self.keep_best] if self.keep_best else []
        for path in paths[: -self.keep_last]:
            if path not in best and not (self.keep_every and update_of(path) % self.keep_every == 0):
                self._delete(path)
        for path in self.folder.glob(".update_*.partial"):
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a folder. A failure is only logged, since the next checkpoint tries again."""
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

    def _on_main_from_all(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value on rank 0, and an empty list on the others."""
        if self.ranks.world_size == 1:
            return [value]
        values = [value] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(value, values, group=group)
        return values or []


def folder_for_one(output: Path) -> Path:
    """The folder in `output` for a checkpoint that is not written by a run.

    Raises:
        UserError: there are checkpoints in it.
    """
    folder = output / "checkpoints"
    if committed(folder):
        raise UserError(f"{folder}: exists; choose another folder")
    return folder


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> str | None:
    """Collective in `group`. Write what this rank holds of each tensor; returns what went wrong, the same on all ranks.

    A tensor that several ranks hold is written by one of them.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    if dist.is_initialized():
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=group)
        except dcp.api.CheckpointException as failure:
            return str(next(iter(failure.failures.values()))[0])
        return None
    try:
        _write_alone(dict(tensors), writer)
    except (OSError, SafetensorError, RuntimeError) as failure:
        return str(failure)
    return None


def _write_alone(tensors: dict[str, Tensor], writer: HuggingFaceStorageWriter) -> None:
    """Do what `dcp.save` does in a process without a process group, where it would warn that there is none."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, storage_meta=writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    (plan,) = writer.prepare_global_plan(planner.create_global_plan([local])[0])
    writer.write_data(planner.finish_plan(plan), planner).wait()


def _written_by(rank: int, folder: Path) -> Written | str:
    """Read back a rank's own files, since other ranks' may not be visible on this machine yet. Or what went wrong."""
    try:
        paths = sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
        slices = [slices_in(path, open_tensors(path)) for path in paths]
        return Written({path.name: file_facts(path) for path in paths}, slices)
    except (OSError, UserError) as failure:
        return str(failure)


def _not_committed(final: Path, what: str, problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    more = f" (and {counted(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
    return f"{final}: not committed: {what}: {problems[0]}{more}; earlier checkpoints are unchanged"


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


def _replace_link(link: Path, target: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)
