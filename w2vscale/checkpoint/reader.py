"""Reading a checkpoint: find it, open it, and read its tensors, whole or sharded in any way.

A checkpoint's tensors lie in several files, in slices: each process that wrote the checkpoint wrote what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from w2vscale.checkpoint.expected import expected_of, meta_model
from w2vscale.checkpoint.format import committed, read_document, size_problem
from w2vscale.checkpoint.slices import Range, StoredTensor, assemble, faults, intersection, open_tensors, slices_in
from w2vscale.config import Config, load_config
from w2vscale.distributed.process_group import raise_anywhere
from w2vscale.errors import UserError
from w2vscale.optim.canonical import (
    TensorSpec,
    counted,
    has_optimizer_state,
    optimizer_problem,
    specs_of,
    stored_dtype,
)


class IncompleteState(UserError):
    """The model in a checkpoint is complete, but no run can be resumed from it."""


class CheckpointReader:
    """A checkpoint on disk. The header of each of its files is read at most once.

    Attributes:
        path: its folder.
        state: the state of the run, from train_state.json.
        files: size and checksum of each of its files but train_state.json, by name.
        ranks: how many processes wrote it.

    Raises:
        UserError: it does not exist, or its train_state.json cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.state, self.files, self.ranks = read_document(path)
        self.path = path.resolve()
        self._opened: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # open files cannot be sent to other ranks

    @property
    def bytes(self) -> int:
        """Size of all files but train_state.json."""
        return sum(facts["bytes"] for facts in self.files.values())

    @property
    def tensor_files(self) -> list[Path]:
        """The files with tensors."""
        return sorted(self.path / name for name in self.files if name.endswith(".safetensors"))

    @cached_property
    def config(self) -> Config:
        """The settings it was made with.

        Raises:
            UserError: its config.yaml cannot be read.
        """
        return load_config(self.path / "config.yaml")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Its tensors by name, as the headers of its files describe them.

        Raises:
            UserError: a file is damaged.
        """
        return assemble(slices_in(file, self._open(file)) for file in self.tensor_files)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and type of each tensor."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @cached_property
    def expected(self) -> dict[str, TensorSpec]:
        """What a checkpoint of a run with its settings holds."""
        return expected_of(self.config)

    @property
    def parameters(self) -> int:
        """Number of values in the parameters of its model."""
        return sum(parameter.numel() for parameter in meta_model(self.config).parameters())

    def faults(self, *, model: bool = True, optimizer: bool = True) -> Iterator[str]:
        """What is wrong with its tensors, by name, compared with the model that its settings describe: one line each.

        Optimizer state is expected only if it holds any. `model` and `optimizer` choose what is looked at.
        """
        optimizer = optimizer and has_optimizer_state(self.tensors)

        def chosen(name: str) -> bool:
            return optimizer if name.startswith("optim.") else model

        found = {name: tensor for name, tensor in self.tensors.items() if chosen(name)}
        return faults(found, {name: spec for name, spec in self.expected.items() if chosen(name)})

    def require_model(self) -> None:
        """Check that it holds every tensor of its model.

        Raises:
            UserError: it does not; the message names the first fault.
        """
        if fault := next(self.faults(optimizer=False), None):
            raise UserError(f"{self.path}: {fault}")

    def require_state(self) -> None:
        """Check that a run can be resumed from it.

        Raises:
            IncompleteState: its optimizer state is incomplete, or of another model.
            UserError: its model is.
        """
        if fault := next(self.faults(optimizer=False), None):
            raise UserError(f"{self.path}: damaged: {fault}")
        if problem := optimizer_problem(self.specs, self.expected):
            raise IncompleteState(f"{self.path}: {problem}")
        if fault := next(self.faults(model=False), None):
            raise IncompleteState(f"{self.path}: {fault}")

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in memory of its own.

        Raises:
            UserError: there is none of this name, or it is not whole.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}")
        if fault := self.tensors[name].fault():
            raise UserError(f"{self.path}: {name}: {fault}")
        spec = self.tensors[name].spec
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        self._fill(name, whole)
        return whole

    def model_tensors(self) -> dict[str, Tensor]:
        """All tensors of its model, whole, by the model's own names.

        Raises:
            UserError: it does not hold every tensor of its model.
        """
        self.require_model()
        return {name.removeprefix("model."): self.tensor(name) for name in self.tensors if name.startswith("model.")}

    def load_model(self, model: nn.Module) -> None:
        """Fill the parameters and persistent buffers of a model that this process holds whole. Not collective.

        Raises:
            UserError: a tensor is missing, has another shape or type, or is not whole.
        """
        self._read_into({f"model.{name}": tensor for name, tensor in model.state_dict().items()})

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Fill the tensors of `state` in place; of DTensors, each rank reads its own shard.

        Raises:
            UserError: on any rank, a tensor is missing, has another shape or type, is not whole, or cannot be read.
                Every rank raises the same error.
        """
        error = None
        try:
            self._read_into(state)
        except UserError as failure:
            error = str(failure)
        raise_anywhere(error)

    @torch.no_grad()
    def _read_into(self, state: Mapping[str, Tensor]) -> None:
        if has_optimizer_state(state) and not has_optimizer_state(self.tensors):
            raise UserError(
                f"{self.path}: holds no optimizer state; start a run from its weights with trainer.init_from, in "
                "another --exp"
            )
        wanted = {name: TensorSpec(spec.shape, stored_dtype(spec.dtype)) for name, spec in specs_of(state).items()}
        found = {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        if fault := next(faults(found, wanted), None):
            raise UserError(f"{self.path}: {fault}; the checkpoint is of another model, or damaged")
        for name, tensor in state.items():
            if isinstance(tensor, DTensor):
                (shard,) = tensor.__create_chunk_list__()
                self._fill(name, tensor.to_local(), tuple(shard.offsets))
            else:
                self._fill(name, tensor)

    def _fill(self, name: str, block: Tensor, offsets: tuple[int, ...] = ()) -> None:
        """Read the block of a tensor that starts at `offsets` (default: its beginning)."""
        offsets = offsets or (0,) * block.dim()
        ends = tuple(map(add, offsets, block.shape))
        for part in self.tensors[name].slices:
            shared = intersection(part.offsets, part.ends, offsets, ends)
            if shared is not None:
                try:
                    values = self._open(part.file).get_slice(name)[_within(shared, part.offsets)]
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{part.file}: cannot be read ({error})") from None
                block[_within(shared, offsets)].copy_(values)

    def values_in(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The slices in one of its files, one at a time, with the names of their tensors.

        Raises:
            UserError: the file is damaged.
        """
        opened = self._open(file)
        for name in slices_in(file, opened):
            yield name, opened.get_tensor(name)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = open_tensors(file)
        return self._opened[file]


def _within(shared: Range, offsets: Iterable[int]) -> tuple[slice, ...]:
    """The index of a part of a tensor in a block of it that starts at `offsets`."""
    return tuple(slice(start - first, end - first) for (start, end), first in zip(shared, offsets, strict=True))


def open_checkpoint(
    path: Path, log: Callable[[str], None] = lambda text: None, *, resuming: bool = False
) -> CheckpointReader:
    """Open one checkpoint folder (or a link to one), or the newest usable one of a run or a folder of checkpoints.

    Not collective. `resuming`: a run must be resumable from it.

    Raises:
        IncompleteState: `resuming`, and its optimizer state is incomplete or of another model.
        UserError: it is missing, incomplete or damaged; the message says how.
    """
    if not (path / "train_state.json").is_file():
        for folder in (path, path / "checkpoints"):
            if found := newest(folder, log, resuming=resuming):
                return found
    checkpoint = CheckpointReader(path)
    for name, facts in checkpoint.files.items():
        if problem := size_problem(path / name, facts):
            raise UserError(f"{path / name}: {problem}")
    _ = checkpoint.tensors  # damaged headers are found now
    if resuming:
        checkpoint.require_state()
    return checkpoint


def newest(folder: Path, log: Callable[[str], None], *, resuming: bool = False) -> CheckpointReader | None:
    """The newest usable checkpoint in `folder`, or None if it has none at all. Not collective.

    `resuming`: a run must be resumable from it. The log names the newer ones that are skipped, and why.

    Raises:
        UserError: there are checkpoints, and none can be used, or all were set aside.
    """
    paths = committed(folder)
    incomplete: list[Path] = []
    for path in reversed(paths):
        try:
            return open_checkpoint(path, resuming=resuming)
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")
            if isinstance(error, IncompleteState):
                incomplete.append(path)
    if incomplete:
        raise UserError(
            f"{folder}: no run can be resumed from its {counted(len(paths), 'checkpoint')}; start one from the "
            f"weights of the newest with trainer.init_from={incomplete[0]}, in another --exp"
        )
    if paths:
        raise UserError(
            f"{folder}: none of its {counted(len(paths), 'checkpoint')} can be used; move them away to start a new run"
        )
    if aside := sorted(folder.glob("abandoned_update_*")):
        # A kill just before the checkpoint that replaces them got its name.
        raise UserError(f"{folder}: all checkpoints were set aside; use --resume {aside[-1]}, or move them away")
    return None


def best_first(paths: Sequence[Path], log: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Those checkpoints that have a validation loss, by increasing loss; of equal ones the first of `paths` first."""
    losses: dict[Path, float] = {}
    for path in paths:
        try:
            loss = CheckpointReader(path).state.validation_loss
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")
            continue
        if loss is not None:
            losses[path] = loss
    return sorted(losses, key=losses.__getitem__)
