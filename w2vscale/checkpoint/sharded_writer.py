"""Writing the tensors of several ranks, with Distributed Checkpoint. Importing that takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.checkpoint.writer import Writable, file_of, finite, own_values
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.errors import UserError
from w2vscale.files import sync
from w2vscale.optim.canonical import TensorSpec


def write_own_parts(tensors: Mapping[str, Writable], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """See `w2vscale.checkpoint.writer.write_tensors`."""
    # Plans need shapes and places, not values.
    state = {name: tensor.like if isinstance(tensor, DeferredTensor) else tensor for name, tensor in tensors.items()}
    try:
        dcp.save(state, storage_writer=_Writer(tensors, folder), process_group=group)
    except dcp.api.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if not isinstance(failure, OSError):
            raise failure from None  # such as a stop signal, or a loader process that was killed meanwhile
        raise UserError(f"{folder}: a checkpoint cannot be written: {failure}") from None


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
                    write_safetensors(file, specs, finite(values), {"DCP_SHARDING_INFO": json.dumps(places)})
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
                own = own_values(tensor)
                if name in items:
                    yield name, own


def _chunk_of(item: WriteItem) -> dcp.metadata.ChunkStorageMetadata:
    assert item.tensor_data is not None, "a checkpoint holds tensors alone"
    return item.tensor_data.chunk


def _spec_of(item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    return TensorSpec(tuple(_chunk_of(item).sizes), item.tensor_data.properties.dtype)
