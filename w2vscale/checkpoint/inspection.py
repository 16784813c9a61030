"""What a checkpoint is, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from w2vscale.checkpoint.reading import (
    Checkpoint,
    FileFacts,
    committed,
    file_facts,
    open_checkpoint,
    read_train_state,
    wrong_size,
)
from w2vscale.checkpoint.shards import StoredTensor, stored_tensors, tensor_files
from w2vscale.config import Config, load_config
from w2vscale.objectives import state_shapes as parameter_shapes
from w2vscale.optim.canonical import canonical_shapes, differences, has_optimizer_state


@dataclass(frozen=True)
class Description:
    """A checkpoint, the settings it was made with, and what it holds."""

    checkpoint: Checkpoint
    config: Config
    tensors: Mapping[str, StoredTensor]

    @property
    def parameters(self) -> int:
        """Number of values in the model's parameters."""
        return sum(tensor.numel for name, tensor in self.tensors.items() if name.startswith("model."))


@dataclass(frozen=True)
class Verification:
    """What was read of a checkpoint, and what is wrong with it: one line each."""

    checkpoint: Checkpoint
    tensors: int
    problems: list[str]


def describe(path: Path, *, log: Callable[[str], None] = lambda text: None) -> Description:
    """Describe a checkpoint, or the newest usable one of a run, from its headers.

    Raises:
        UserError: it is missing, incomplete or damaged.
    """
    checkpoint = open_checkpoint(path, log)
    return Description(
        checkpoint,
        load_config(checkpoint.path / "config.yaml"),
        stored_tensors(tensor_files(checkpoint.path)),
    )


def verify(path: Path, *, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read all of a checkpoint, or of the newest one of a run, and look for what is wrong.

    Files are compared with their recorded sizes and checksums, and values must be finite. If all files are as they
    were written, their shards must cover every tensor of the model and, unless it is an imported one without optimizer
    state, of its optimizer. Holds one tensor at a time.

    Raises:
        UserError: there is no checkpoint, or its train_state.json or config.yaml cannot be read.
    """
    checkpoint = read_train_state(_newest_folder(path))
    done = 0
    intact: list[Path] = []
    problems = [
        f"{file.name}: not listed in train_state.json"
        for file in tensor_files(checkpoint.path)
        if file.name not in checkpoint.files
    ]
    for name, facts in sorted(checkpoint.files.items()):
        file = checkpoint.path / name
        if damage := _damage(file, facts):
            problems.append(f"{name}: {damage}")
        else:
            try:
                problems.extend(f"{name}: {problem}" for problem in _not_finite(file))
                intact.append(file)
            except SafetensorError as error:
                problems.append(f"{name}: cannot be read ({error})")
        done += facts["bytes"]
        if progress is not None:
            progress(done, checkpoint.bytes)
    tensors = stored_tensors(file for file in intact if file.suffix == ".safetensors")
    if len(intact) == len(checkpoint.files):
        problems.extend(_incomplete(tensors, load_config(checkpoint.path / "config.yaml")))
    return Verification(checkpoint, len(tensors), problems)


def _newest_folder(path: Path) -> Path:
    """`path`, or the newest checkpoint in it, usable or not."""
    for folder in (path, path / "checkpoints"):
        if paths := committed(folder):
            return max(paths)
    return path


def _damage(file: Path, facts: FileFacts) -> str | None:
    try:
        if problem := wrong_size(file, facts):
            return problem
        if file_facts(file) != facts:
            return "its content is not what was written (SHA-256)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _not_finite(file: Path) -> Iterator[str]:
    if file.suffix != ".safetensors":
        return
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_tensor(name)
            if count := tensor.numel() - int(tensor.isfinite().sum()):
                yield f"{name}: {count} of {tensor.numel()} values are not finite"


def _incomplete(tensors: Mapping[str, StoredTensor], config: Config) -> Iterator[str]:
    expected = canonical_shapes(parameter_shapes(config), optimizer=has_optimizer_state(tensors))
    yield from differences({name: tensor.shape for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        if fault := tensor.fault():
            yield f"{name}: {fault}"
