"""From a checkpoint's shards to one file of whole tensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from w2vscale.checkpoint.reading import open_checkpoint
from w2vscale.checkpoint.shards import StoredTensor, stored_tensors, tensor_files
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.objectives import state_shapes as parameter_shapes
from w2vscale.optim.canonical import canonical_shapes, differences, has_optimizer_state


@dataclass(frozen=True)
class Consolidated:
    """The file that was written, and from what."""

    file: Path
    update: int
    tensors: int
    bytes: int


def consolidate(
    path: Path,
    output: Path,
    *,
    optimizer: bool = False,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Consolidated:
    """Write `output`/model.safetensors and config.yaml from a checkpoint, or the newest usable one of a run.

    Tensors are whole and fp32. They have the model's own names; with `optimizer`, the checkpoint's: `model.NAME`,
    `optim.NAME.exp_avg`, …. Holds one tensor at a time.

    Raises:
        UserError: the checkpoint cannot be used, or `output` cannot be written or has such files already.
    """
    checkpoint = open_checkpoint(path, log)
    tensors = stored_tensors(tensor_files(checkpoint.path))
    config = load_config(checkpoint.path / "config.yaml")
    expected = canonical_shapes(parameter_shapes(config), optimizer=has_optimizer_state(tensors))
    wanted = {name: shape for name, shape in expected.items() if optimizer or name.startswith("model.")}
    if problem := next(differences({name: x.shape for name, x in tensors.items() if name in wanted}, wanted), None):
        raise UserError(f"{checkpoint.path}: {problem}")
    if not optimizer:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name, tensor in tensors.items():
        if fault := tensor.fault():
            raise UserError(f"{checkpoint.path}: {name}: {fault}")
    weights, settings = output / "model.safetensors", output / "config.yaml"
    for file in (weights, settings):
        if file.exists():
            raise UserError(f"{file}: exists; choose another folder")
    named = tensors if optimizer else {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    text_of_config = (checkpoint.path / "config.yaml").read_bytes()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _new_file(settings) as text, _new_file(weights) as data:
            text.write(text_of_config)
            data.write(_header(named, {"format": "pt", "update": str(checkpoint.state.update)}))
            for done, whole in enumerate(whole_tensors(tensors), start=1):
                data.write(whole.numpy().data)
                if progress is not None:
                    progress(done, len(tensors))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return Consolidated(weights, checkpoint.state.update, len(tensors), weights.stat().st_size)


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file of fp32 tensors in this order begins with."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.bytes
        entries[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return struct.pack("<Q", len(text)) + text


def whole_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """Each tensor, put together from its shards."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, tensor in tensors.items():
            whole = torch.empty(tensor.shape)
            for shard in tensor.shards:
                if shard.file not in files:
                    files[shard.file] = stack.enter_context(safe_open(shard.file, framework="pt"))
                block = tuple(slice(*ends) for ends in zip(shard.offsets, shard.ends, strict=True))
                whole[block] = files[shard.file].get_tensor(name)
            yield whole


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
