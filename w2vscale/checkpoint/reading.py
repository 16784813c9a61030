"""Checkpoint folders on disk: what one is, and finding the newest usable one.

A checkpoint holds `*.safetensors` (torch Distributed Checkpoint), `config.yaml` and `train_state.json`, which
lists the other files with their sizes and checksums. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from w2vscale.checkpoint.shards import StoredTensor, stored_tensors, tensor_files, tensor_shapes
from w2vscale.errors import UserError
from w2vscale.optim.canonical import counted, has_optimizer_state, incomplete_state, missing_weight

FORMAT = 2
FOLDER = re.compile(r"update_(\d{8,})")


class IncompleteState(UserError):
    """A checkpoint with whole weights, but from which no run can be continued."""


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
    data: str = ""
    """The training set, in words and checksums."""
    validation_loss: float | None = None
    """At this very update; None where it was not validated, or the loss is not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState
    files: Mapping[str, FileFacts]
    ranks: int
    """How many processes wrote it."""

    @property
    def bytes(self) -> int:
        """Size of all files but train_state.json."""
        return sum(facts["bytes"] for facts in self.files.values())

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective. Fill `tensors`, which may be sharded in any way, in place.

        Raises:
            UserError: a tensor is missing, has another shape or is not whole.
        """
        found = stored_tensors(tensor_files(self.path))
        stored = {name: tensor.shape for name, tensor in found.items()}
        if has_optimizer_state(tensors) and not has_optimizer_state(stored):
            raise UserError(
                f"{self.path}: holds no optimizer state; start a run from it with trainer.init_from, in another --exp"
            )
        for name, tensor in tensors.items():
            if name not in stored:
                raise UserError(f"{self.path}: holds no tensor {name}: it belongs to another model")
            if stored[name] != tuple(tensor.shape):
                raise UserError(f"{self.path}: {name} is {list(stored[name])}, the model wants {list(tensor.shape)}")
            if fault := found[name].fault():
                raise UserError(f"{self.path}: {name}: {fault}")
        accept_one_process()
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self.path)))


def read_model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint's model, whole, fp32, by the model's own names."""
    tensors = {
        name: torch.empty(shape) for name, shape in tensor_shapes(checkpoint.path).items() if name.startswith("model.")
    }
    checkpoint.read_into(tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load_model_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Fill a model, without any optimizer, from a checkpoint."""
    checkpoint.read_into({f"model.{name}": p.detach() for name, p in model.named_parameters()})


def committed(folder: Path) -> list[Path]:
    """Committed checkpoint folders in `folder`, in any order."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]


def newest(folder: Path, log: Callable[[str], None], *, resuming: bool = False) -> Checkpoint | None:
    """The newest usable checkpoint in a folder of them, or None where there is none at all. Not collective.

    `resuming`: one that a run can be continued from.

    Raises:
        UserError: there are some, and none can be used, or all were set aside.
    """
    paths = sorted(committed(folder), reverse=True)
    incomplete: list[Path] = []
    for path in paths:
        try:
            return open_checkpoint(path, resuming=resuming)
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")
            if isinstance(error, IncompleteState):
                incomplete.append(path)
    if incomplete:
        raise UserError(
            f"{folder}: no run can be continued from its {counted(len(paths), 'checkpoint')}; start one from the "
            f"weights of the newest with trainer.init_from={incomplete[0]}, in another --exp"
        )
    if paths:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints can be used; move them away to start anew")
    if aside := sorted(folder.glob("abandoned_update_*")):
        # A kill just before the checkpoint that replaces them got its name.
        raise UserError(
            f"{folder}: all checkpoints were set aside; continue with --resume {aside[-1]}, or move them away"
        )
    return None


def open_checkpoint(
    path: Path, log: Callable[[str], None] = lambda text: None, *, resuming: bool = False
) -> Checkpoint:
    """Open one checkpoint folder (or a link to one), or the newest usable one in a folder of checkpoints.

    Not collective. With `resuming`, its optimizer state must be complete.

    Raises:
        IncompleteState: `resuming`, and its optimizer state is not whole, or not that of its weights.
        UserError: it is missing, incomplete or damaged; the message says how.
    """
    if not (path / "train_state.json").is_file():
        for folder in (path, path / "checkpoints"):
            if found := newest(folder, log, resuming=resuming):
                return found
    checkpoint = read_train_state(path)
    for name, facts in checkpoint.files.items():
        if problem := wrong_size(path / name, facts):
            raise UserError(f"{path / name}: {problem}")
    tensors = stored_tensors(tensor_files(path))
    if resuming:
        _check_whole(path, tensors)
    return checkpoint


def _check_whole(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if fault := tensor.fault():
            raise (IncompleteState if name.startswith("optim.") else UserError)(f"{path}: {name}: {fault}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if missing := missing_weight(shapes):
        raise UserError(f"{path}: damaged: it does not hold {missing}")
    if problem := incomplete_state(shapes):
        raise IncompleteState(f"{path}: {problem}")


def read_train_state(path: Path) -> Checkpoint:
    """A checkpoint as its train_state.json describes it; its other files are not looked at. Not collective.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    file = path / "train_state.json"
    if not file.is_file():
        raise UserError(f"{path}: not a checkpoint: no train_state.json in it")
    try:
        document: dict[str, Any] = json.loads(file.read_text())
        if document["format"] != FORMAT:
            raise UserError(f"{file}: format {document['format']}, this version reads {FORMAT}")
        facts = {"data": "", "validation_loss": None} | document
        return Checkpoint(
            path=path.resolve(),
            state=TrainState(**{field.name: facts[field.name] for field in fields(TrainState)}),
            files={
                name: FileFacts(bytes=facts["bytes"], sha256=facts["sha256"])
                for name, facts in document["files"].items()
            },
            ranks=document["ranks"],
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from None


def wrong_size(file: Path, facts: FileFacts) -> str | None:
    """Why a file cannot be the one that was written, or None."""
    if not file.is_file():
        return "missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"holds {size} bytes, {facts['bytes']} were written"
    return None


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return FileFacts(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def update_of(path: Path) -> int:
    """The update that a checkpoint folder's name says."""
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def accept_one_process() -> None:
    """Without torch's warning that one process is one process. Not for a time: filters belong to all threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
