"""Whole tensors split by rows over the ranks, in host memory: how unsharded state is written and read in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from w2vscale.engine.base import StateReader


def block_of_rows(whole: Tensor, index: int, count: int) -> Tensor:
    """Block `index` of `count` equal blocks of rows; the last may have fewer or none, as with `Shard(0)`."""
    blocks = whole.chunk(count)
    return blocks[index] if index < len(blocks) else whole[:0]


class Rows:
    """Splits tensors over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self.alone:
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self.host_mesh = init_device_mesh("cpu", (self.world_size,))
            self.device_mesh = init_device_mesh(device.type, (self.world_size,))

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank has, in host memory; what has no rows stays as it is."""
        if self.alone or whole.dim() == 0:
            return whole
        return self._shard(self._local(whole), whole.shape, self.host_mesh)

    def copied(self, whole: Tensor) -> Tensor:
        """As `own`, in memory of its own, so that `whole` can be given up."""
        if self.alone or whole.dim() == 0:
            return whole.to("cpu", copy=True)
        return self._shard(self._local(whole).to("cpu", copy=True), whole.shape, self.host_mesh)

    def read(self, reader: StateReader, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 tensors on the device, one at a time, from a checkpoint of which every rank reads its rows."""
        state = {name: self._empty(shape) for name, shape in shapes.items()}
        reader.read_into(state)
        for name in list(state):
            yield name, self._whole(state.pop(name))

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        if self.alone or not shape:
            return torch.empty(shape)
        local = self._local(torch.empty(shape, device="meta"))
        return self._shard(torch.empty(local.shape), shape, self.host_mesh)

    def _whole(self, rows: Tensor) -> Tensor:
        if not isinstance(rows, DTensor):
            return rows.to(self.device)
        return self._shard(rows.to_local().to(self.device), rows.shape, self.device_mesh).full_tensor()

    def _local(self, whole: Tensor) -> Tensor:
        return block_of_rows(whole, self.rank, self.world_size)

    def _shard(self, local: Tensor, shape: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
