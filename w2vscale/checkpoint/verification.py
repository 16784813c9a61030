"""Verification: read all of a checkpoint, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from w2vscale.checkpoint.format import FileFacts, committed, file_facts, size_problem
from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.errors import UserError


@dataclass(frozen=True)
class Verification:
    """The checkpoint that was read, and what is wrong with it: one line each."""

    checkpoint: CheckpointReader
    problems: list[str]


def verify(path: Path, *, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read all of a checkpoint, or of the newest one of a run, and look for problems.

    Compares files with their recorded sizes and checksums, and checks that values are finite. If all files are intact,
    also checks that they hold every tensor of the model, and of its optimizer unless they hold no optimizer state at
    all. Holds one tensor at a time. `progress` gets the bytes read so far, and those of the whole checkpoint.

    Raises:
        UserError: there is no checkpoint, or its train_state.json or config.yaml cannot be read.
    """
    checkpoint = CheckpointReader(_newest_folder(path))
    problems = [
        f"{file.name}: not listed in train_state.json"
        for file in sorted(checkpoint.path.glob("*.safetensors"))
        if file.name not in checkpoint.files
    ]
    intact = True
    done = 0
    for name, facts in sorted(checkpoint.files.items()):
        file = checkpoint.path / name
        if damage := _damage(file, facts):
            intact = False
            problems.append(f"{name}: {damage}")
        elif file.suffix == ".safetensors":
            try:
                problems += [f"{name}: {problem}" for problem in _not_finite(checkpoint, file)]
            except UserError as error:
                intact = False
                problems.append(str(error).replace(str(file), name, 1))
        done += facts["bytes"]
        if progress is not None:
            progress(done, checkpoint.bytes)
    if intact:
        problems += checkpoint.faults()
    return Verification(checkpoint, problems)


def _damage(file: Path, facts: FileFacts) -> str | None:
    try:
        if problem := size_problem(file, facts):
            return problem
        if file_facts(file) != facts:
            return "its content is not what was written (SHA-256)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _not_finite(checkpoint: CheckpointReader, file: Path) -> Iterator[str]:
    for name, values in checkpoint.values_in(file):
        if count := values.numel() - int(values.isfinite().sum()):
            yield f"{name}: {count} of {values.numel()} values are not finite"


def _newest_folder(path: Path) -> Path:
    """`path`, or the newest checkpoint in it, usable or not."""
    for folder in (path, path / "checkpoints"):
        if paths := committed(folder):
            return paths[-1]
    return path
