"""A checkpoint folder on disk: its name, its files, and train_state.json.

A checkpoint holds `*.safetensors`, `config.yaml` and `train_state.json`, which lists the other files with their sizes
and checksums. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from w2vscale.errors import UserError
from w2vscale.files import safetensors_header
from w2vscale.optim.canonical import Specs

FORMAT = 2
FOLDER = re.compile(r"update_(\d{8,})")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""Types by their names in safetensors files."""


def write_safetensors(
    file: IO[bytes], specs: Specs, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with these names, shapes and types. `tensors` may be made one at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {name: (names[spec.dtype], spec.shape) for name, spec in specs.items()}
    file.write(safetensors_header(header, metadata))
    for tensor in tensors:
        file.write(tensor.contiguous().numpy().data)


class FileFacts(TypedDict):
    """What train_state.json records of another file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TrainState:
    """The state of a run besides its tensors and settings."""

    update: int = 0
    audio_seconds: float = 0.0
    skipped_updates: int = 0
    skipped_utterances: int = 0
    data: str = ""
    """A description of the training set, with checksums."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Finite metrics of the validation at this update, by name; empty if there was none."""


class Document(NamedTuple):
    """The content of train_state.json."""

    state: TrainState
    files: Mapping[str, FileFacts]
    ranks: int
    """How many processes wrote the checkpoint."""


def encode(document: Document) -> str:
    """The text of train_state.json."""
    content = {"format": FORMAT, **asdict(document.state), "ranks": document.ranks, "files": document.files}
    return json.dumps(content, indent=2) + "\n"


def read_document(path: Path) -> Document:
    """Read train_state.json in the checkpoint folder `path`. A UserError says why it cannot be read."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    file = path / "train_state.json"
    if not file.is_file():
        raise UserError(f"{path}: not a checkpoint: it has no train_state.json")
    try:
        content: dict[str, Any] = {"data": ""} | json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            if "validation" not in content:  # written before all metrics were kept
                loss = content.get("validation_loss")
                content["validation"] = {} if loss is None else {"loss": loss}
            if not all(math.isfinite(value) for value in dict(content["validation"]).values()):
                raise ValueError("validation: not finite")
            state = TrainState(**{each.name: content[each.name] for each in fields(TrainState)})
            files = {
                name: FileFacts(bytes=facts["bytes"], sha256=facts["sha256"])
                for name, facts in content["files"].items()
            }
            return Document(state, files, content["ranks"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from None
    raise UserError(f"{file}: format {content['format']}; this version of w2vscale reads format {FORMAT}")


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return FileFacts(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


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


def update_of(path: Path) -> int:
    """The update in the name of a checkpoint folder."""
    return int(path.name.removeprefix("update_"))
