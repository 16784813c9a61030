"""Tensors that are read when they are needed, whole or some of their rows.

Conversions pass them on in place of tensors, so that a model of any size needs memory for one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2vscale.distributed.process_group import errors_on_all_ranks
from w2vscale.distributed.sharded import as_dtensor
from w2vscale.optim.canonical import TensorSpec


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read by `read(first, last)`: the rows [first, last). A scalar counts as one row."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor in memory, or in a file that is mapped into memory."""

        def read(first: int, last: int) -> Tensor:
            return tensor[first:last] if tensor.dim() else tensor

        return cls(tuple(tensor.shape), tensor.dtype, read)

    @classmethod
    def made(cls, spec: TensorSpec, make: Callable[[], Tensor]) -> LazyTensor:
        """A tensor that `make` computes, all of it for any of its rows."""
        return cls(spec.shape, spec.dtype, lambda first, last: make()[first:last] if spec.shape else make())

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        """Size of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of its values."""
        return self.read(0, self.count)

    def chunks(self, count: int) -> list[LazyTensor]:
        """Split it by rows into `count` parts of equal size."""
        rows = self.shape[0] // count
        shape = (rows, *self.shape[1:])

        def part(start: int) -> LazyTensor:
            return LazyTensor(shape, self.dtype, lambda first, last: self.read(start + first, start + last))

        return [part(number * rows) for number in range(count)]

    def view(self, *shape: int) -> LazyTensor:
        """The same values in another shape; -1 stands for one size. Reads all of them for any of its rows."""
        sizes = tuple(torch.empty(self.shape, device="meta").view(shape).shape)
        return LazyTensor.made(TensorSpec(sizes, self.dtype), lambda: self.whole().reshape(sizes))

    def map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LazyTensor:
        """Apply a function to the rows that are read. It must not change the shape. `dtype`: that of its results."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda first, last: change(self.read(first, last)))


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Several tensors of one type and width, one below the other."""
    if len(parts) == 1:
        return parts[0]

    def read(first: int, last: int) -> Tensor:
        found, start = [], 0
        for part in parts:
            begin, end = max(first - start, 0), min(last - start, part.count)
            if begin < end:
                found.append(part.read(begin, end))
            start += part.count
        return torch.cat(found) if found else parts[0].read(0, 0)

    return LazyTensor((sum(part.count for part in parts), *parts[0].shape[1:]), parts[0].dtype, read)


def lazy(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """A `state_dict` as lazy tensors."""
    return {name: LazyTensor.of(tensor) for name, tensor in state.items()}


def whole(state: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """Read all of a `state_dict` into memory."""
    return {name: tensor.whole() for name, tensor in state.items()}


def counted_reads(state: Mapping[str, LazyTensor], progress: Callable[[int, int], None]) -> dict[str, LazyTensor]:
    """Call `progress` with the bytes that were read so far and the bytes of all tensors, after each read."""
    total = sum(tensor.bytes for tensor in state.values())
    done = 0

    def count(rows: Tensor) -> Tensor:
        nonlocal done
        done += rows.nbytes
        progress(done, total)
        return rows

    return {name: tensor.map(count) for name, tensor in state.items()}


@dataclass(frozen=True)
class LazyReader:
    """Reads tensors of a canonical state (`model.<name>`) from lazy ones (`<name>`)."""

    tensors: Mapping[str, LazyTensor]

    @torch.no_grad()
    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `state` in place; of DTensors, each rank reads its own rows. Collective."""
        with errors_on_all_ranks():
            for name, tensor in state.items():
                source = self.tensors[name.removeprefix("model.")]
                if (sharded := as_dtensor(tensor)) is None:
                    tensor.copy_(source.whole())
                elif (own := sharded.to_local()).numel():
                    (shard,) = sharded.__create_chunk_list__()
                    assert own.shape[1:] == tensor.shape[1:], "engines shard tensors by rows"
                    own.copy_(source.read(shard.offsets[0], shard.offsets[0] + len(own)))
