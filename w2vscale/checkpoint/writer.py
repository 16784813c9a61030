"""Writing tensor files of a checkpoint: each rank writes what it holds, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from w2vscale.checkpoint.format import write_safetensors
from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.errors import UserError
from w2vscale.files import new_file, sync
from w2vscale.optim.canonical import TensorSpec, specs_of

Writable = Tensor | LazyTensor | DeferredTensor


class NotFinite(UserError):
    """The tensor that the message names holds a value that is not finite."""


def write_tensors(tensors: Mapping[str, Writable], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Collective in `group`. Write what this rank holds of each tensor; one of several ranks that hold it writes it.

    Lazy tensors can be written by a process that is alone. Raises NotFinite, on all ranks, if a value is not finite.
    """
    if not dist.is_initialized():
        with new_file(folder / file_of(0), "wb", durable=True) as file:
            values = ((name, _own(tensor)) for name, tensor in tensors.items())
            return write_safetensors(file, specs_of(tensors), _finite(values))
    # Plans need shapes and places, not values.
    state = {name: tensor.like if isinstance(tensor, DeferredTensor) else tensor for name, tensor in tensors.items()}
    try:
        dcp.save(state, storage_writer=_Writer(tensors, folder), process_group=group)
    except dcp.api.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if not isinstance(failure, OSError):
            raise failure from None  # such as a stop signal, or a loader process that was killed meanwhile
        raise UserError(f"{folder}: a checkpoint cannot be written: {failure}") from None


def file_of(rank: int) -> str:
    """Name of the file that a rank writes: the one that Distributed Checkpoint gives it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


class _Writer(HuggingFaceStorageWriter):
    """Distributed Checkpoint decides which rank writes which part. Its own writer makes two copies of all parts."""

    def __init__(self, tensors: Mapping[str, Writable], folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.tensors = tensors

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "a rank holds one part of each tensor"
        items = {name: items[name] for name in self.tensors if name in items}
        values = self._values(items)
        try:
            if items:
                specs = {name: _spec_of(item) for name, item in items.items()}
                places = {name: {"saved_offsets": list(_chunk_of(item).offsets)} for name, item in items.items()}
                path = Path(self.path) / file_of(plan.storage_data["shard_index"] - 1)
                with path.open("xb") as file:
                    write_safetensors(file, specs, _finite(values), {"DCP_SHARDING_INFO": json.dumps(places)})
                sync(path)
        finally:
            for _ in values:  # other ranks need this one to make the deferred tensors, whatever fails on it
                pass
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # what they would say is in the headers of the files
        return written

    def _values(self, items: Mapping[str, WriteItem]) -> Iterator[tuple[str, Tensor]]:
        """Make all deferred tensors, and yield those of `items` in their order."""
        for name, tensor in self.tensors.items():
            if name in items or isinstance(tensor, DeferredTensor):
                own = _own(tensor)
                if name in items:
                    yield name, own


def _chunk_of(item: WriteItem) -> dcp.metadata.ChunkStorageMetadata:
    assert item.tensor_data is not None, "a checkpoint holds tensors alone"
    return item.tensor_data.chunk


def _spec_of(item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    return TensorSpec(tuple(_chunk_of(item).sizes), item.tensor_data.properties.dtype)


def _own(tensor: Writable) -> Tensor:
    """The values that this rank holds, on the CPU."""
    if isinstance(tensor, LazyTensor):
        return tensor.whole()
    made = tensor.make() if isinstance(tensor, DeferredTensor) else tensor
    # No operation of a DTensor: in a second thread, such as of a background save, they crash PyTorch 2.11.
    with torch.no_grad():
        local = made.to_local() if isinstance(made, DTensor) else made
    return local.detach().cpu()


def _finite(values: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Yield the tensors. Raises NotFinite if a value is not finite."""
    for name, tensor in values:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN where any value is
            if not (low.isfinite() and high.isfinite()):
                raise NotFinite(name)
        yield tensor
