"""Checkpoint folders: written under a temporary name, made durable, renamed; found newest first.

A checkpoint holds `*.safetensors` (torch Distributed Checkpoint), `config.yaml` and `train_state.json`, which
lists the other files with their sizes and checksums. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from w2vscale.distributed.process_group import Ranks, broadcast_from_main
from w2vscale.errors import UserError

FORMAT = 2
FOLDER = re.compile(r"update_(\d{8,})")


class FileFacts(TypedDict):
    """What a checkpoint remembers of each of its files."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TrainState:
    """All that a run is besides its tensors and settings."""

    update: int = 0
    audio_seconds: float = 0.0
    skipped_updates: int = 0
    skipped_utterances: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState
    files: Mapping[str, FileFacts]

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective. Fill `tensors`, which may be sharded in any way, in place.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        stored = tensor_shapes(self.path)
        for name, tensor in tensors.items():
            if name not in stored:
                raise UserError(f"{self.path}: holds no tensor {name}: it belongs to another model")
            if stored[name] != tuple(tensor.shape):
                raise UserError(f"{self.path}: {name} is {list(stored[name])}, the model wants {list(tensor.shape)}")
        with _quiet():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self.path)))


class CheckpointStore:
    """The checkpoints of one run. Methods are collective unless they say otherwise."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        asynchronous: bool = False,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keep_last = keep_last
        self.keep_every = keep_every
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
        """
        began = time.perf_counter()
        self.wait()
        final = self.folder / f"update_{state.update:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._on_main(lambda: _fresh_folder(partial))
        if self._thread is None:
            error = self._write(tensors, partial, final, state, config_yaml, began)
            self._raise_anywhere(error)
        else:
            copies = {name: _copy(tensor) for name, tensor in tensors.items()}
            stall = time.perf_counter() - began
            self._writing = self._thread.submit(self._write, copies, partial, final, state, config_yaml, began, stall)
        return final

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._raise_anywhere(writing.result())

    @property
    def failed(self) -> bool:
        """Whether writing in the background has failed on this rank: `wait` will raise. Not collective."""
        return self._writing is not None and self._writing.done() and self._writing.result() is not None

    def find(self, log: Callable[[str], None]) -> Checkpoint | None:
        """The newest usable checkpoint; says which newer ones were passed over and why.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        found: Checkpoint | str | None = None
        if self.ranks.is_main:
            try:
                found = newest(self.folder, log)
            except UserError as error:
                found = str(error)
        found = broadcast_from_main(found)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _write(
        self,
        tensors: Mapping[str, Tensor],
        partial: Path,
        final: Path,
        state: TrainState,
        config_yaml: str,
        began: float,
        stall: float | None = None,
    ) -> str | None:
        """Write and commit; returns what went wrong. Collective in the store's own group, if it has one."""
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            with _quiet():
                dcp.save(dict(tensors), storage_writer=writer, process_group=self._group)
        except dcp.api.CheckpointException as failure:
            cause = next(iter(failure.failures.values()))[0]
            return f"{partial}: a checkpoint cannot be written: {cause}"
        try:
            files = self._files(partial)
            if self.ranks.is_main:
                self._commit(partial, final, state, config_yaml, files)
                seconds = time.perf_counter() - began
                waited = "" if stall is None else f", training waited {stall:.2f} s"
                self.log(f"saved {final} in {seconds:.2f} s{waited}")
        except OSError as failure:
            return f"{self.folder}: a checkpoint cannot be written: {failure}"
        return None

    def _files(self, partial: Path) -> dict[str, FileFacts]:
        """Size and checksum of every tensor file; each rank reads some of them."""
        paths = sorted(partial.glob("*.safetensors"))
        own = {path.name: file_facts(path) for path in paths[self.ranks.rank :: self.ranks.world_size]}
        if self.ranks.world_size == 1:
            return own
        gathered: list[dict[str, FileFacts]] = [{}] * self.ranks.world_size
        dist.all_gather_object(gathered, own, group=self._group)
        return {name: facts for part in gathered for name, facts in part.items()}

    def _commit(
        self, partial: Path, final: Path, state: TrainState, config_yaml: str, files: dict[str, FileFacts]
    ) -> None:
        _write_durably(partial / "config.yaml", config_yaml)
        files = {**files, "config.yaml": file_facts(partial / "config.yaml")}
        document = {"format": FORMAT, **asdict(state), "files": files}
        _write_durably(partial / "train_state.json", json.dumps(document, indent=2) + "\n")
        _sync_folder(partial)
        for path in committed(self.folder):
            # The same update saved again, or later ones that this run did not continue from.
            if _update_of(path) >= state.update:
                _set_aside(path)
        partial.rename(final)
        _sync_folder(self.folder)
        _replace_link(self.folder / "latest", final.name)
        for path in sorted(committed(self.folder))[: -self.keep_last]:
            if not (self.keep_every and _update_of(path) % self.keep_every == 0):
                shutil.rmtree(path)
        for path in self.folder.glob(".update_*.partial"):
            shutil.rmtree(path)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run on rank 0; its error is raised on all ranks."""
        error: str | None = None
        if self.ranks.is_main:
            try:
                action()
            except OSError as failure:
                error = f"{self.folder}: a checkpoint cannot be written: {failure}"
        self._raise_anywhere(error)

    def _raise_anywhere(self, error: str | None) -> None:
        """Raise the error of the lowest rank that has one, on all ranks."""
        errors = [error]
        if self.ranks.world_size > 1:
            errors = [None] * self.ranks.world_size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise UserError(found)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoint folders in `folder`, in any order."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]


def newest(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest usable checkpoint in a folder of them, or None where there is none at all. Not collective.

    Raises:
        UserError: there are some, and none can be used.
    """
    paths = sorted(committed(folder), reverse=True)
    for path in paths:
        try:
            return open_checkpoint(path)
        except UserError as error:
            log(f"passed over: {error}")
    if paths:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints can be used; move them away to start anew")
    return None


def open_checkpoint(path: Path, log: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """Open one checkpoint folder (or a link to one), or the newest usable one in a folder of checkpoints.

    Not collective.

    Raises:
        UserError: it is missing, incomplete or damaged; the message says how.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    document_path = path / "train_state.json"
    if not document_path.is_file():
        for folder in (path, path / "checkpoints"):
            if found := newest(folder, log):
                return found
        raise UserError(f"{path}: not a checkpoint: no train_state.json in it")
    try:
        document: dict[str, Any] = json.loads(document_path.read_text())
        state = TrainState(**{field.name: document[field.name] for field in fields(TrainState)})
        files = {
            path / name: FileFacts(bytes=facts["bytes"], sha256=facts["sha256"])
            for name, facts in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{document_path}: damaged ({type(error).__name__}: {error})") from None
    if document.get("format") != FORMAT:
        raise UserError(f"{document_path}: format {document.get('format')}, this version reads {FORMAT}")
    for file, facts in files.items():
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != facts["bytes"]:
            raise UserError(f"{file}: holds {file.stat().st_size} bytes, {facts['bytes']} were written")
    tensor_shapes(path)
    return Checkpoint(path.resolve(), state, {file.name: facts for file, facts in files.items()})


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return FileFacts(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Whole shape of every tensor in a checkpoint, from the headers of its shards."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                info = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shape = tensors.get_slice(name).get_shape()
                    offsets = info.get(name, {}).get("saved_offsets", [0] * len(shape))
                    ends = tuple(size + offset for size, offset in zip(shape, offsets, strict=True))
                    known = shapes.get(name, ends)
                    shapes[name] = tuple(max(a, b) for a, b in zip(known, ends, strict=True))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error})") from None
    return shapes


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


def _update_of(path: Path) -> int:
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


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


class _quiet(warnings.catch_warnings):
    """Without torch's warning that one process is one process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def load_model_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Fill a model, without any optimizer, from a checkpoint."""
    checkpoint.read_into({f"model.{name}": p.detach() for name, p in model.named_parameters()})
