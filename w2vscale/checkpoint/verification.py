"""Verification: read all of a checkpoint, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from w2vscale.checkpoint.format import committed, damage
from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.errors import UserError


class Verification(NamedTuple):
    """The checkpoint that was read, and what is wrong with it: one line each."""

    checkpoint: CheckpointReader
    problems: list[str]


def verify(path: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Read all of a checkpoint, or of the newest one of a run, usable or not, and look for problems.

    Compares files with their recorded sizes and checksums, and checks that values are finite. If all files are intact,
    also checks that they hold every tensor of the model, and of its optimizer unless they hold no optimizer state at
    all. Holds one tensor at a time. `progress` gets the bytes read so far, and those of the whole checkpoint.

    Raises UserError if there is no checkpoint, or its train_state.json or config.yaml cannot be read.
    """
    *_, newest = path, *committed(path / "checkpoints"), *committed(path)
    checkpoint = CheckpointReader(newest)
    problems = [f"{name}: not listed in train_state.json" for name in checkpoint.unlisted()]
    intact = True
    done = 0
    for name, facts in sorted(checkpoint.files.items()):
        file = checkpoint.path / name
        try:
            if problem := damage(file, facts):
                raise UserError(f"{file}: {problem}")
            if file.suffix == ".safetensors":
                problems += [f"{name}: {values}" for values in _not_finite(checkpoint, file)]
        except UserError as error:
            intact = False
            problems.append(str(error).replace(str(file), name, 1))
        done += facts["bytes"]
        progress(done, checkpoint.bytes)
    if intact:
        problems += checkpoint.faults()
    return Verification(checkpoint, problems)


def _not_finite(checkpoint: CheckpointReader, path: Path) -> Iterator[str]:
    file = checkpoint.file(path)
    for name in file.slices:
        values = file.opened.get_tensor(name)
        if count := values.numel() - int(values.isfinite().sum()):
            yield f"{name}: {count} of {values.numel()} values are not finite"
