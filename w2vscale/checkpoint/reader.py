"""Reading a checkpoint: find it, open it, and read its tensors, whole or sharded in any way.

A checkpoint's tensors lie in several files, in slices: each process that wrote the checkpoint wrote what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from w2vscale.checkpoint.expected import expected_of, meta_model
from w2vscale.checkpoint.format import FileFacts, committed, damages, read_document, size_problem, update_of
from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.slices import Block, StoredTensor, TensorFile, assemble, block_at, faults, intersection
from w2vscale.config import Config, load_config
from w2vscale.distributed.process_group import errors_on_all_ranks
from w2vscale.distributed.sharded import as_dtensor
from w2vscale.errors import UserError, counted
from w2vscale.models.initialisation import allocate, empty_parameters
from w2vscale.objectives import Objective
from w2vscale.optim.canonical import (
    TensorSpec,
    has_average,
    has_optimizer_state,
    model_only,
    optimizer_problem,
    stored_dtype,
)


class IncompleteState(UserError):
    """The model in a checkpoint is complete, but no run can be resumed from it."""


class CheckpointReader:
    """A checkpoint on disk. The header of each of its files is read at most once. UserError if one is damaged.

    `state` is the state of the run, `files` the size and checksum of each file but train_state.json by name, and
    `ranks` the number of processes that wrote it.
    """

    def __init__(self, path: Path) -> None:
        document = read_document(path)
        self.state, self.files, self.ranks = document.state, document.files, document.ranks
        self.path = path.resolve()
        self._opened: dict[Path, TensorFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # open files cannot be sent to other ranks

    @property
    def tensor_files(self) -> dict[str, FileFacts]:
        """Size and checksum of its files with tensors, sorted by name: those of rank 0 come first."""
        return {name: facts for name, facts in sorted(self.files.items()) if name.endswith(".safetensors")}

    def unlisted(self) -> list[str]:
        """Names of files with tensors that are in its folder and do not belong to it."""
        return sorted(file.name for file in self.path.glob("*.safetensors") if file.name not in self.files)

    def check(self, *, resuming: bool = False) -> None:
        """Raise a UserError if a file is missing, added or of another size, or its settings or headers are damaged.

        Reads the headers of the files with tensors, but not the values. `resuming`: also raise IncompleteState if no
        run can be resumed from it.
        """
        if unlisted := self.unlisted():
            raise UserError(f"{self.path / unlisted[0]}: not listed in train_state.json")
        for name, facts in self.tensor_files.items():
            if problem := size_problem(self.path / name, facts):
                raise UserError(f"{self.path / name}: {problem}")
        others = {name: facts for name, facts in self.files.items() if name not in self.tensor_files}
        for problem in damages(self.path, others):
            raise UserError(problem)
        _ = self.tensors  # reads the headers
        if resuming:
            self.require_state()

    @property
    def bytes(self) -> int:
        """Size of all files but train_state.json."""
        return sum(facts["bytes"] for facts in self.files.values())

    @cached_property
    def config(self) -> Config:
        """The settings it was made with."""
        return load_config(self.path / "config.yaml")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Its tensors by name, as the headers of its files describe them."""
        return assemble(self.file(self.path / name).slices for name in self.tensor_files)

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

    def faults(self, part: str = "") -> Iterator[str]:
        """What is wrong with its tensors, compared with the model that its settings describe: one line each.

        Optimizer state and average are expected only if it holds optimizer state. `part`: look only at names that begin
        with it, such as "model.".
        """
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(part)}
        expected = {name: spec for name, spec in self.expected.items() if name.startswith(part)}
        return faults(found, expected if has_optimizer_state(self.tensors) else model_only(expected))

    def require_model(self, *, optimizer: bool = False) -> None:
        """Raise a UserError unless it holds every tensor of its model. `optimizer`: see also to all others."""
        if fault := next(self.faults("" if optimizer else "model."), None):
            raise UserError(f"{self.path}: {fault}")

    def require_state(self) -> None:
        """Raise IncompleteState if no run can be resumed from it; UserError if its model is incomplete too."""
        if fault := next(self.faults("model."), None):
            raise UserError(f"{self.path}: damaged: {fault}")
        others = chain(self.faults("optim."), self.faults("ema."))
        if problem := optimizer_problem(self.specs, self.expected) or next(others, None):
            raise IncompleteState(f"{self.path}: {problem}")

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in memory of its own."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}")
        if fault := self.tensors[name].fault():
            raise UserError(f"{self.path}: {name}: {fault}")
        spec = self.tensors[name].spec
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        self._fill(name, whole)
        return whole

    @property
    def has_average(self) -> bool:
        """Whether it holds the moving average of the weights."""
        return has_average(self.tensors)

    def stored_names(self, weights: str | None = None) -> dict[str, str]:
        """The names of the tensors of its model in the checkpoint, by the model's own names.

        `weights`: "ema" for the averaged weights, "raw" for those of the last update, None for the averaged ones if it
        has them. Raises UserError if it does not have what is asked for, or the average is not complete.
        """
        if weights not in (None, "ema", "raw"):
            raise UserError(f"weights={weights}: choose ema or raw")
        if weights == "ema" and not self.has_average:
            raise UserError(f"{self.path}: has no averaged weights (optim.ema_decay is 0); choose weights=raw")
        kinds = ("model", "ema") if self.weights_read(weights) == "ema" else ("model",)
        if "ema" in kinds and (fault := next(self.faults("ema."), None)):
            raise UserError(f"{self.path}: {fault}")
        # Frozen parameters and buffers have no average.
        parts = (name.partition(".") for kind in kinds for name in self.tensors if name.startswith(f"{kind}."))
        return {own: f"{kind}.{own}" for kind, _, own in parts}

    def weights_read(self, weights: str | None = None) -> str:
        """What `stored_names` chooses: "ema" or "raw"."""
        return "ema" if self.has_average and weights != "raw" else "raw"

    def describe_weights(self, weights: str | None = None) -> str:
        """What `stored_names` chooses, in words."""
        if self.weights_read(weights) == "ema":
            return f"averaged weights (optim.ema_decay={self.config.optim.ema_decay:g})"
        return "weights of the last update"

    def model_tensors(self, weights: str | None = None) -> dict[str, LazyTensor]:
        """All tensors of its model, by the model's own names. They are read when they are needed.

        `weights`: see `stored_names`.
        """
        self.require_model()
        return {own: self.lazy(name) for own, name in self.stored_names(weights).items()}

    def lazy(self, name: str) -> LazyTensor:
        """One tensor, which is read when it is needed."""
        spec = self.tensors[name].spec

        def read(first: int, last: int) -> Tensor:
            if not spec.shape:
                return self.tensor(name)
            rows = torch.empty(last - first, *spec.shape[1:], dtype=spec.dtype)
            self._fill(name, rows, [first, *[0] * (rows.dim() - 1)])
            return rows

        return LazyTensor(spec.shape, spec.dtype, read)

    def build_model(
        self, objective: Objective, device: torch.device | str = "cpu", *, weights: str | None = None
    ) -> Any:
        """The model of an objective with its tensors, whole, on a device. Not collective.

        `weights`: see `stored_names`.
        """
        with empty_parameters():
            model = objective.build_model()
        allocate(model, device)
        self.load_model(model, weights)
        return model

    def load_model(self, model: nn.Module, weights: str | None = None) -> None:
        """Fill the parameters and persistent buffers of a model that this process holds whole. Not collective."""
        self._read_into(self.state_to_read(model, weights))

    def state_to_read(self, model: nn.Module, weights: str | None = None) -> dict[str, Tensor]:
        """The parameters and persistent buffers of a model, by the names of the tensors that fill them."""
        names = self.stored_names(weights)
        return {names.get(own, f"model.{own}"): tensor for own, tensor in model.state_dict().items()}

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Fill the tensors of `state` in place; of DTensors, each rank reads its own shard.

        Every rank raises the same UserError if one of them finds a tensor that is missing, of another shape or type, or
        not whole, or cannot read it.
        """
        with errors_on_all_ranks():
            self._read_into(state)

    @torch.no_grad()
    def _read_into(self, state: Mapping[str, Tensor]) -> None:
        if has_optimizer_state(state) and not has_optimizer_state(self.tensors):
            raise UserError(
                f"{self.path}: holds no optimizer state; start a run from its weights with trainer.init_from, in "
                "another --exp"
            )
        wanted = {name: TensorSpec(tuple(t.shape), stored_dtype(t.dtype)) for name, t in state.items()}
        found = {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        if fault := next(faults(found, wanted), None):
            raise UserError(f"{self.path}: {fault}; the checkpoint is of another model, or damaged")
        for name, tensor in state.items():
            if (sharded := as_dtensor(tensor)) is None:
                self._fill(name, tensor)
            else:
                (shard,) = sharded.__create_chunk_list__()
                self._fill(name, sharded.to_local(), shard.offsets)

    def _fill(self, name: str, values: Tensor, offsets: Sequence[int] | None = None) -> None:
        """Read the block of a tensor that starts at `offsets` (default: its beginning)."""
        wanted = block_at(offsets or [0] * values.dim(), values.shape)
        for part in self.tensors[name].slices:
            shared = intersection(part.block, wanted)
            if all(shared):
                try:
                    found = self.file(part.file).opened.get_slice(name)[_within(part.block, shared)]
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{part.file}: cannot be read ({error})") from None
                values[_within(wanted, shared)].copy_(found)

    def file(self, path: Path) -> TensorFile:
        """One of its files with tensors."""
        if path not in self._opened:
            self._opened[path] = TensorFile(path)
        return self._opened[path]


def _within(block: Block, part: Block) -> tuple[slice, ...]:
    """The index of a part of a tensor in a block of it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, block, strict=True))


def open_checkpoint(
    path: Path,
    log: Callable[[str], None] = lambda text: None,
    *,
    resuming: bool = False,
    hashed: bool = True,
) -> CheckpointReader:
    """Open one checkpoint folder (or a link to one), or the newest usable one of a run or a folder of checkpoints.

    Not collective. `resuming`: a run must be resumable from it. `hashed`: compare the checksums of all its files;
    without it, damaged values are not noticed. Raises UserError if there is none that can be used.
    """
    found = candidates(path, log, resuming=resuming)
    checkpoint = next(found, None)
    while checkpoint is not None and hashed:
        problem = next(damages(checkpoint.path, checkpoint.tensor_files), None)
        if problem is None:
            break
        checkpoint = found.throw(UserError(problem))
    return checkpoint or CheckpointReader(path)


def candidates(
    path: Path, log: Callable[[str], None], *, resuming: bool = False, up_to: int | None = None
) -> Generator[CheckpointReader, None, None]:
    """Yield the checkpoint at `path`, or those of a run or a folder of checkpoints, newest first. Not collective.

    `up_to`: of a run or a folder, only checkpoints of this update and earlier ones.
    Each has passed `check`. The caller throws a UserError in if it finds that a checkpoint is damaged; the next one
    follows. The log names those that are skipped, and why. Yields nothing if there is no checkpoint.

    Raises UserError if there are checkpoints and none can be used, or all were set aside.
    """
    if (path / "train_state.json").is_file():
        checkpoint = CheckpointReader(path)
        try:
            checkpoint.check(resuming=resuming)
        except IncompleteState as error:
            raise UserError(
                f"{error}; resume from an older checkpoint, or start a run from its weights with "
                f"trainer.init_from={path}, in another --exp"
            ) from None
        yield checkpoint
        return
    for folder in (path, path / "checkpoints"):
        if folder.is_dir():
            yield from _newest_first(folder, log, resuming=resuming, up_to=up_to)


def _newest_first(
    folder: Path, log: Callable[[str], None], *, resuming: bool, up_to: int | None
) -> Generator[CheckpointReader, None, None]:
    paths = [path for path in committed(folder) if up_to is None or update_of(path) <= up_to]
    incomplete: list[Path] = []
    for path in reversed(paths):
        try:
            checkpoint = CheckpointReader(path)
            checkpoint.check(resuming=resuming)
            yield checkpoint
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")
            if isinstance(error, IncompleteState):
                incomplete.append(path)
    count = counted(len(paths), "checkpoint")
    if incomplete:
        raise UserError(
            f"{folder}: no run can be resumed from its {count}; start one from the weights of the newest with "
            f"trainer.init_from={incomplete[0]}, in another --exp"
        )
    if paths:
        raise UserError(f"{folder}: none of its {count} can be used; move them away to start a new run")
    if up_to is None and (aside := sorted(folder.glob("abandoned_update_*"))):
        # A kill just before the checkpoint that replaces them got its name.
        raise UserError(f"{folder}: all checkpoints were set aside; use --resume {aside[-1]}, or move them away")


def best_first(paths: Sequence[Path], metric: str, log: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Return the checkpoints with this validation metric, lowest value first; of equal ones the first of `paths`."""
    values: dict[Path, float] = {}
    for path in paths:
        try:
            validation = CheckpointReader(path).state.validation
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")
            continue
        if metric in validation:
            values[path] = validation[metric]
    return sorted(values, key=values.__getitem__)
