"""Which part of which tensor lies in which file of a checkpoint, and whether the parts make up whole tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from w2vscale.checkpoint.safetensors_file import DTYPES
from w2vscale.errors import UserError
from w2vscale.optim.canonical import Specs, TensorSpec, differences, type_name

Block = tuple[range, ...]
"""A rectangular part of a tensor: the indices that it covers in each dimension."""


def block_at(offsets: Sequence[int], shape: Sequence[int]) -> Block:
    """The block of this shape that starts at `offsets`."""
    return tuple(range(start, start + size) for start, size in zip(offsets, shape, strict=True))


def intersection(one: Block, other: Block) -> Block:
    """What two blocks share. If they share nothing, at least one of its ranges is empty."""
    return tuple(range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


class TensorSlice(NamedTuple):
    """A part of a tensor, in one file."""

    file: Path
    dtype: torch.dtype
    block: Block


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint."""

    slices: list[TensorSlice]

    @property
    def spec(self) -> TensorSpec:
        """Type, and shape as far as the slices reach."""
        dimensions = zip(*(part.block for part in self.slices), strict=True)
        return TensorSpec(tuple(max(part.stop for part in each) for each in dimensions), self.slices[0].dtype)

    @property
    def numel(self) -> int:
        """Number of values of the whole tensor."""
        return math.prod(self.spec.shape)

    def fault(self) -> str | None:
        """Why the slices are not one whole tensor, or None."""
        if len(types := {part.dtype for part in self.slices}) > 1:
            return f"its slices have different types ({', '.join(sorted(map(type_name, types)))})"
        if _overlap(part.block for part in self.slices):
            return "its slices overlap"
        if sum(math.prod(map(len, part.block)) for part in self.slices) != self.numel:
            return "its slices leave a gap"
        return None


def _overlap(blocks: Iterable[Block]) -> bool:
    """Whether any two blocks overlap.

    Compares only blocks that share an index of the first dimension: for a tensor that is split along it, the usual
    case, this takes little more than a sort.
    """
    beside: list[Block] = []
    for block in sorted(filter(all, blocks), key=lambda block: [indices.start for indices in block]):
        beside = [other for other in beside if all(intersection(other[:1], block[:1]))]
        if any(all(intersection(other, block)) for other in beside):
            return True
        beside.append(block)
    return False


def faults(tensors: Mapping[str, StoredTensor], expected: Specs) -> Iterator[str]:
    """Which of these tensors are not whole or not as expected, or missing: one line each."""
    broken = {name: fault for name, tensor in tensors.items() if (fault := tensor.fault())}
    yield from (f"{name}: {fault}" for name, fault in broken.items())
    yield from differences(
        {name: tensor.spec for name, tensor in tensors.items() if name not in broken},
        {name: spec for name, spec in expected.items() if name not in broken},
    )


class TensorFile:
    """An opened tensor file, and the slices in it by the names of their tensors. Reads the header only.

    Raises UserError if the file is damaged, or its header does not describe slices of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.slices: dict[str, TensorSlice] = {}
        try:
            self.opened: Any = safe_open(path, framework="pt")
            places = json.loads((self.opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in self.opened.keys():  # noqa: SIM118 - not a mapping
                stored = self.opened.get_slice(name)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                offsets = places[name]["saved_offsets"] if name in places else [0] * len(shape)
                if len(offsets) != len(shape):
                    raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
                if dtype not in DTYPES:
                    raise ValueError(f"{name} has the unknown type {dtype}")
                self.slices[name] = TensorSlice(path, DTYPES[dtype], block_at(offsets, shape))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error})") from None


def assemble(files: Iterable[Mapping[str, TensorSlice]]) -> dict[str, StoredTensor]:
    """The tensors that the slices of all files make up, by name.

    Raises UserError if slices of one tensor differ in their number of dimensions.
    """
    tensors: dict[str, StoredTensor] = {}
    for slices in files:
        for name, part in slices.items():
            parts = tensors.setdefault(name, StoredTensor([])).slices
            parts.append(part)
            if len(part.block) != len(parts[0].block):
                raise UserError(
                    f"{part.file}: damaged ({name} has {len(part.block)} dimensions, in {parts[0].file.name} it has "
                    f"{len(parts[0].block)})"
                )
    return tensors
