"""Writing tensor files of a checkpoint: each rank writes what it holds, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.distributed.sharded import as_dtensor
from w2vscale.errors import UserError
from w2vscale.files import new_file
from w2vscale.optim.canonical import specs_of

Writable = Tensor | LazyTensor | DeferredTensor


class NotFinite(UserError):
    """The tensor that the message names holds a value that is not finite."""


def write_tensors(tensors: Mapping[str, Writable], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Collective in `group`. Write what this rank holds of each tensor; one of several ranks that hold it writes it.

    Lazy tensors can be written by a process that is alone. Raises NotFinite, on all ranks, if a value is not finite.
    """
    if dist.is_initialized():
        from w2vscale.checkpoint.sharded_writer import write_own_parts

        return write_own_parts(tensors, folder, group)
    with new_file(folder / file_of(0), "wb", durable=True) as file:
        values = ((name, own_values(tensor)) for name, tensor in tensors.items())
        return write_safetensors(file, specs_of(tensors), finite(values))


def file_of(rank: int) -> str:
    """Name of the file that a rank writes: the one that Distributed Checkpoint gives it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def own_values(tensor: Writable) -> Tensor:
    """The values that this rank holds, on the CPU."""
    if isinstance(tensor, LazyTensor):
        return tensor.whole()
    made = tensor.make() if isinstance(tensor, DeferredTensor) else tensor
    # No operation of a DTensor: in a second thread, such as of a background save, they crash PyTorch 2.11.
    with torch.no_grad():
        local = made if (sharded := as_dtensor(made)) is None else sharded.to_local()
    return local.detach().cpu()


def finite(values: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Yield the tensors. Raises NotFinite if a value is not finite."""
    for name, tensor in values:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN where any value is
            if not (low.isfinite() and high.isfinite()):
                raise NotFinite(name)
        yield tensor
