"""Verification: read all of a checkpoint, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from w2vscale.checkpoint.format import FileFacts, committed, file_facts, size_problem
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
    problems = [
        f"{file.name}: not listed in train_state.json"
        for file in sorted(checkpoint.path.glob("*.safetensors"))
        if file.name not in checkpoint.files
    ]
    intact = True
    done = 0
    for name, facts in sorted(checkpoint.files.items()):
        file = checkpoint.path / name
        try:
            if damage := _damage(file, facts):
                raise UserError(f"{file}: {damage}")
            if file.suffix == ".safetensors":
                problems += [f"{name}: {problem}" for problem in _not_finite(checkpoint, file)]
        except UserError as error:
            intact = False
            problems.append(str(error).replace(str(file), name, 1))
        done += facts["bytes"]
        progress(done, checkpoint.bytes)
    if intact:
        problems += checkpoint.faults()
    return Verification(checkpoint, problems)


def _damage(file: Path, facts: FileFacts) -> str | None:
    try:
        if problem := size_problem(file, facts):
            return problem
        return None if file_facts(file) == facts else "its content is not what was written (SHA-256)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _not_finite(checkpoint: CheckpointReader, path: Path) -> Iterator[str]:
    file = checkpoint.file(path)
    for name in file.slices:
        values = file.opened.get_tensor(name)
        if count := values.numel() - int(values.isfinite().sum()):
            yield f"{name}: {count} of {values.numel()} values are not finite"
