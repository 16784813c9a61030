"""Consolidation: the tensors of a checkpoint, whole, in one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from w2vscale.checkpoint.format import DTYPE_NAMES
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.errors import UserError
from w2vscale.files import new_file, safetensors_header


@dataclass(frozen=True)
class Consolidated:
    """The file that was written, and the update of its checkpoint."""

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

    Tensors are whole, and have the types that they have in the checkpoint: fp32, but integer and bool buffers their
    own. They have the model's own names; with `optimizer`, those of the checkpoint: `model.NAME`,
    `optim.NAME.exp_avg`, …. Holds one tensor at a time.

    Raises:
        UserError: the checkpoint cannot be used, or `output` cannot be written or already has one of the files.
    """
    checkpoint = open_checkpoint(path, log)
    if fault := next(checkpoint.faults(optimizer=optimizer), None):
        raise UserError(f"{checkpoint.path}: {fault}")
    weights, settings = output / "model.safetensors", output / "config.yaml"
    for file in (weights, settings):
        if file.exists():
            raise UserError(f"{file}: exists; choose another folder")
    names = [name for name in checkpoint.tensors if optimizer or name.startswith("model.")]
    header = {
        name if optimizer else name.removeprefix("model."): (DTYPE_NAMES[spec.dtype], spec.shape)
        for name, spec in checkpoint.specs.items()
        if name in names
    }
    text_of_config = (checkpoint.path / "config.yaml").read_bytes()
    with new_file(settings, "wb", durable=True) as text, new_file(weights, "wb", durable=True) as data:
        text.write(text_of_config)
        data.write(safetensors_header(header, {"update": str(checkpoint.state.update)}))
        for done, name in enumerate(names, start=1):
            data.write(checkpoint.tensor(name).numpy().data)
            if progress is not None:
                progress(done, len(names))
    return Consolidated(weights, checkpoint.state.update, len(names), weights.stat().st_size)
