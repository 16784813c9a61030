"""Consolidation: the tensors of a checkpoint, whole, in one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from w2vscale.checkpoint.lazy import counted_reads
from w2vscale.checkpoint.new_folder import new_folder
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.errors import UserError
from w2vscale.optim.canonical import specs_of

WEIGHTS = "model.safetensors"


class Consolidated(NamedTuple):
    """The file that was written, and the update of its checkpoint."""

    file: Path
    update: int
    tensors: int


def consolidate(
    path: Path,
    output: Path,
    *,
    optimizer: bool = False,
    weights: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Consolidated:
    """Write `output`/model.safetensors and config.yaml from a checkpoint, or the newest usable one of a run.

    Tensors are whole, and have the types that they have in the checkpoint: fp32, but integer and bool buffers their
    own. They have the model's own names, and values by `weights` (see `CheckpointReader.stored_names`); with
    `optimizer`, all tensors have the names of the checkpoint: `model.NAME`, `optim.NAME.exp_avg`, …. Holds one tensor
    at a time.

    Raises UserError if the checkpoint cannot be used, or `output` cannot be written or is not an empty folder.
    """
    if optimizer and weights is not None:
        raise UserError(f"--weights {weights}: leave it out; with --optimizer both weights are written")
    checkpoint = open_checkpoint(path, log)
    checkpoint.require_model(optimizer=optimizer)
    names = {name: name for name in checkpoint.specs} if optimizer else checkpoint.stored_names(weights)
    tensors = {own: checkpoint.lazy(name) for own, name in names.items()}
    values = (tensor.whole() for tensor in counted_reads(tensors, progress).values())
    text_of_config = (checkpoint.path / "config.yaml").read_bytes()
    size = sum(tensor.bytes for tensor in tensors.values())
    with new_folder(output, size=size, log=log) as folder:
        (folder / "config.yaml").write_bytes(text_of_config)
        with (folder / WEIGHTS).open("wb") as file:
            write_safetensors(file, specs_of(tensors), values, {"update": str(checkpoint.state.update)})
    return Consolidated(output / WEIGHTS, checkpoint.state.update, len(tensors))
