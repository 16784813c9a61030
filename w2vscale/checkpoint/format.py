"""A checkpoint folder on disk: its name, its files, and train_state.json.

A checkpoint holds `*.safetensors`, `config.yaml` and `train_state.json`, which lists the other files with their sizes
and checksums, and has a checksum of its own. Nothing in it is ever unpickled.

This module does not import PyTorch, which takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from w2vscale.errors import UserError, refused_value
from w2vscale.files import delete, nearest_path

FORMAT = 3
WITHOUT_CHECKSUM = 2  # the format before train_state.json had a checksum of its own
HASHED_AT_ONCE = 4  # files
FOLDER = re.compile(r"update_(\d{8,})")
STATE = "train_state.json"
ABANDONED = "abandoned_"  # before the name of a checkpoint from which the run did not go on

Count = Annotated[int, Field(ge=0, lt=2**40)]
LARGEST_STATE = 2**26  # bytes of train_state.json


class NewerFormat(UserError):
    """A checkpoint was written by a later version of w2vscale."""


class FileFacts(TypedDict):
    """What train_state.json records of another file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True)
class BestValidation:
    """The best validation of a run so far, and what came after it."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    metric: str
    value: float | None = None
    """None: no validation has had a finite value."""
    update: Count = 0
    since: Count = 0
    """How many validations came after it."""


@dataclass(frozen=True)
class TrainState:
    """The state of a run besides its tensors and settings."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    update: Count = 0
    audio_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    skipped_updates: Count = 0
    skipped_utterances: Count = 0
    skipped_windows: Count = 0
    """How many windows a run has left out since it began, because it went back behind them."""
    data: str = ""
    """A description of the training set, with checksums."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Finite metrics of the validation at this update, by name; empty if there was none."""
    best: BestValidation | None = None
    """By `trainer.best_metric`; None if there was no validation."""

    @property
    def window(self) -> int:
        """The window, from 0, of the next update."""
        return self.update + self.skipped_windows


@dataclass(frozen=True)
class Document:
    """The content of train_state.json."""

    state: TrainState
    files: Mapping[str, FileFacts]
    ranks: Annotated[int, Field(ge=1)]
    """How many processes wrote the checkpoint."""


_DOCUMENT = TypeAdapter(Document)


def encode(document: Document) -> str:
    """The text of train_state.json."""
    content = {"format": FORMAT, **asdict(document.state), "ranks": document.ranks, "files": document.files}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=2) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_document(path: Path) -> Document:
    """Read train_state.json in the checkpoint folder `path`. A UserError says why it cannot be read."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint{nearest_path(path)}")
    file = path / "train_state.json"
    if not file.is_file():
        if (path / "checkpoints").is_dir():
            raise UserError(f"{path}: this run has no checkpoint yet (checkpoint.every says when it writes one)")
        raise UserError(f"{path}: not a checkpoint: it has no train_state.json")
    try:
        if (size := file.stat().st_size) > LARGEST_STATE:
            raise ValueError(f"has {size} bytes")
        text = file.read_bytes()
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from None
    return decode(text, file=str(file), folder=path.resolve().name)


def decode(text: bytes, *, file: str, folder: str) -> Document:
    """Parse train_state.json, which `file` names, of a folder. A UserError says why it cannot be read.

    It is a NewerFormat if a later version of w2vscale reads it.
    """
    try:
        content: dict[str, Any] = json.loads(text.decode())
        found = content["format"]
        if found == FORMAT and content.pop("sha256", None) != _checksum(content):
            raise ValueError("its content is not what was written (SHA-256)")
        if found in (FORMAT, WITHOUT_CHECKSUM):
            document = _document(content)
            if FOLDER.fullmatch(folder) and folder != folder_name(document.state.update):
                raise ValueError(f"it is of update {document.state.update}")
            return document
    except ValidationError as error:
        raise UserError(f"{file}: damaged ({refused_value(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from None
    newer = isinstance(found, int) and found > FORMAT
    message = f"{file}: format {found}; this version of w2vscale reads format {FORMAT}"
    raise NewerFormat(f"{message}; use a later version") if newer else UserError(message)


def _document(content: dict[str, Any]) -> Document:
    content.setdefault("data", "")
    content.setdefault("skipped_windows", 0)
    content.setdefault("best", None)
    if "validation" not in content:  # written before all metrics were kept
        loss = content.pop("validation_loss", None)
        content["validation"] = {} if loss is None else {"loss": loss}
    state = {each.name: content.pop(each.name) for each in fields(TrainState)}
    found = {"state": state, "files": content.pop("files"), "ranks": content.pop("ranks")}
    if unknown := content.keys() - {"format"}:
        raise ValueError(f"unknown key {min(unknown)}")
    document = _DOCUMENT.validate_json(json.dumps(found), strict=True)
    if outside := [name for name in document.files if name in ("", ".", "..") or "/" in name]:
        raise ValueError(f"{outside[0]!r} is not the name of a file in the folder")
    if "config.yaml" not in document.files:
        raise ValueError("config.yaml is not listed")
    return document


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return FileFacts(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def damages(folder: Path, files: Mapping[str, FileFacts]) -> Iterator[str]:
    """What is wrong with files in `folder`, by their sizes and checksums: one line each. Reads several at once."""
    names = sorted(files)
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        found = pool.map(lambda name: damage(folder / name, files[name]), names)
        yield from (f"{folder / name}: {problem}" for name, problem in zip(names, found, strict=True) if problem)


def damage(file: Path, facts: FileFacts) -> str | None:
    """Why the content of a file is not what was written, or None."""
    try:
        if problem := size_problem(file, facts):
            return problem
        return None if file_facts(file) == facts else "its content is not what was written (SHA-256)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def size_problem(file: Path, facts: FileFacts) -> str | None:
    """Why a file cannot be the one that was written, judging by its size, or None."""
    if not file.is_file():
        return "missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"has {size} bytes, expected {facts['bytes']}"
    return None


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()), key=update_of)


def folder_name(update: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"update_{update:08d}"


def update_of(path: Path) -> int:
    """The update in the name of a checkpoint folder."""
    return int(path.name.removeprefix("update_"))


def set_aside(folder: Path, prefix: str) -> Path:
    """Put a prefix before the name of a folder, in place of one that has this name."""
    aside = folder.with_name(prefix + folder.name)
    if os.path.lexists(aside):
        delete(aside)
    return folder.rename(aside)
