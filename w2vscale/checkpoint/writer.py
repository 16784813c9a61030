"""Writing tensor files of a checkpoint: each rank writes what it holds, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from w2vscale.checkpoint.format import write_safetensors
from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.errors import UserError
from w2vscale.files import new_file, sync
from w2vscale.optim.canonical import TensorSpec, specs_of


def write_tensors(
    tensors: Mapping[str, Tensor | LazyTensor], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Collective in `group`. Write what this rank holds of each tensor; one of several ranks that hold it writes it.

    Lazy tensors can be written by a process that is alone.
    """
    if not dist.is_initialized():
        with new_file(folder / file_of(0), "wb", durable=True) as file:
            return write_safetensors(file, specs_of(tensors), map(_on_cpu, tensors.values()))
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(str(folder), save_distributed=True), process_group=group)
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

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if plan.items:
            specs = {item.index.fqn: _spec_of(item) for item in plan.items}
            assert len(specs) == len(plan.items), "a rank holds one part of each tensor"
            places = {item.index.fqn: {"saved_offsets": list(_chunk_of(item).offsets)} for item in plan.items}
            values = (cast(Tensor, planner.resolve_data(item)).detach().cpu() for item in plan.items)
            path = Path(self.path) / file_of(plan.storage_data["shard_index"] - 1)
            with path.open("xb") as file:
                write_safetensors(file, specs, values, {"DCP_SHARDING_INFO": json.dumps(places)})
            sync(path)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # what they would say is in the headers of the files
        return written


def _chunk_of(item: WriteItem) -> dcp.metadata.ChunkStorageMetadata:
    assert item.tensor_data is not None, "a checkpoint holds tensors alone"
    return item.tensor_data.chunk


def _spec_of(item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    return TensorSpec(tuple(_chunk_of(item).sizes), item.tensor_data.properties.dtype)


def _on_cpu(tensor: Tensor | LazyTensor) -> Tensor:
    return tensor.whole() if isinstance(tensor, LazyTensor) else tensor.detach().cpu()
