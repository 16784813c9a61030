"""Consolidation: the tensors of a checkpoint, whole, in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from w2vscale.checkpoint.format import write_safetensors
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.errors import UserError
from w2vscale.files import new_file


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
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Consolidated:
    """Write `output`/model.safetensors and config.yaml from a checkpoint, or the newest usable one of a run.

    Tensors are whole, and have the types that they have in the checkpoint: fp32, but integer and bool buffers their
    own. They have the model's own names; with `optimizer`, those of the checkpoint: `model.NAME`,
    `optim.NAME.exp_avg`, …. Holds one tensor at a time.

    Raises UserError if the checkpoint cannot be used, or `output` cannot be written or already has one of the files.
    """
    checkpoint = open_checkpoint(path, log)
    checkpoint.require_model(optimizer=optimizer)
    weights, settings = output / "model.safetensors", output / "config.yaml"
    for file in (weights, settings):
        if file.exists():
            raise UserError(f"{file}: exists; choose another folder")
    part = "" if optimizer else "model."
    specs = {name: spec for name, spec in checkpoint.specs.items() if name.startswith(part)}

    def tensors() -> Iterator[Tensor]:
        for done, name in enumerate(specs, start=1):
            yield checkpoint.tensor(name)
            progress(done, len(specs))

    named = {name.removeprefix(part): spec for name, spec in specs.items()}
    text_of_config = (checkpoint.path / "config.yaml").read_bytes()
    with new_file(settings, "wb", durable=True) as text, new_file(weights, "wb", durable=True) as data:
        text.write(text_of_config)
        write_safetensors(data, named, tensors(), {"update": str(checkpoint.state.update)})
    return Consolidated(weights, checkpoint.state.update, len(specs))
