"""Split unsharded tensors by rows over the ranks, so that checkpoints are written and read in parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_dtensor

from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.engine.base import StateReader
from w2vscale.optim.canonical import Specs, TensorSpec

PART_BYTES = 2**30
"""Size of the tensors that are read at once; each time, the ranks wait for each other."""


def in_parts(specs: Specs) -> Iterator[list[str]]:
    """Split names, in their order, into parts whose tensors have PART_BYTES together, but at least one tensor each."""
    part: list[str] = []
    size = 0
    for name, spec in specs.items():
        own = math.prod(spec.shape) * spec.dtype.itemsize
        if part and size + own > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    if part:
        yield part


def moved(tensor: DTensor, mesh: DeviceMesh) -> DTensor:
    """Move a DTensor to a mesh of another device type, keeping its placements. What is there already is not copied."""
    return _placed(tensor.to_local().to(mesh.device_type), tensor, mesh)


def on_host(tensor: DTensor, mesh: DeviceMesh) -> DTensor | DeferredTensor:
    """A live DTensor on a mesh of the host if its values are there. If they are on a GPU, they are copied later."""
    local = tensor.to_local()
    if local.device.type == mesh.device_type:
        return moved(tensor, mesh)
    return DeferredTensor(_placed(torch.empty_like(local, device="meta"), tensor, mesh), lambda: moved(tensor, mesh))


def _placed(local: Tensor, tensor: DTensor, mesh: DeviceMesh) -> DTensor:
    """A DTensor like another one, on another mesh and with other local values."""
    return DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


class Rows:
    """Splits tensors by rows over all ranks; in a single process, tensors stay whole."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self.alone:
            self.host_mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            self.device_mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def own(self, whole: Tensor) -> Tensor | DeferredTensor:
        """Return the rows of this rank of a tensor that all ranks hold. In host memory, they are live. Scalars stay
        whole."""
        if self._unsplit(whole.shape):
            return whole
        return on_host(self._split(whole, self.device_mesh), self.host_mesh)

    def gathered(self, spec: TensorSpec, gather: Callable[[], Tensor]) -> DeferredTensor:
        """Return the rows of this rank of a tensor that `gather`, which may be collective, makes when it is needed."""
        like = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if self._unsplit(spec.shape):
            return DeferredTensor(like, lambda: gather().detach().to("cpu", copy=True))

        def make() -> Tensor:
            rows = self._split(gather(), self.device_mesh)
            # A copy even in host memory, so that the whole tensor can be freed.
            return _placed(rows.to_local().to("cpu", copy=True), rows, self.host_mesh)

        return DeferredTensor(self._split(like, self.host_mesh), make)

    def _unsplit(self, shape: Sequence[int]) -> bool:
        return self.alone or not shape

    @staticmethod
    def _split(whole: Tensor, mesh: DeviceMesh) -> DTensor:
        return distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)

    def read(self, reader: StateReader, specs: Specs) -> Iterator[tuple[str, Tensor]]:
        """Read a checkpoint, each rank its own rows, and yield the whole tensors on the device one at a time."""
        for names in in_parts(specs):
            state = {name: self._empty(specs[name]) for name in names}
            reader.read_into(state)
            for name in names:
                yield name, self._whole(state.pop(name))

    def _empty(self, spec: TensorSpec) -> Tensor:
        if self._unsplit(spec.shape):
            return torch.empty(spec.shape, dtype=spec.dtype)
        return empty_dtensor(*spec.shape, dtype=spec.dtype, device_mesh=self.host_mesh, placements=[Shard(0)])

    def _whole(self, rows: Tensor) -> Tensor:
        if not isinstance(rows, DTensor):
            return rows.to(self.device)
        return moved(rows, self.device_mesh).full_tensor()
