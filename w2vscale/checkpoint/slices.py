"""Which part of which tensor lies in which file of a checkpoint, and whether the parts make up whole tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import add, attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from w2vscale.checkpoint.format import DTYPES
from w2vscale.errors import UserError
from w2vscale.optim.canonical import Specs, TensorSpec, differences, type_name

Range = tuple[tuple[int, int], ...]
"""Start and end in each dimension."""


def intersection(
    starts: Iterable[int], ends: Iterable[int], other_starts: Iterable[int], other_ends: Iterable[int]
) -> Range | None:
    """What two rectangular parts of a tensor share, or None."""
    shared = tuple(zip(map(max, starts, other_starts), map(min, ends, other_ends), strict=True))
    return shared if all(start < end for start, end in shared) else None


class TensorSlice(NamedTuple):
    """A rectangular part of a tensor, in one file."""

    file: Path
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the slice ends in the whole tensor."""
        return tuple(map(add, self.offsets, self.shape))

    def overlaps(self, other: TensorSlice) -> bool:
        """Whether both have some value of the tensor."""
        return intersection(self.offsets, self.ends, other.offsets, other.ends) is not None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    slices: tuple[TensorSlice, ...]

    @property
    def spec(self) -> TensorSpec:
        """Type, and shape as far as the slices reach."""
        ends = (part.ends for part in self.slices)
        return TensorSpec(tuple(max(each) for each in zip(*ends, strict=True)), self.slices[0].dtype)

    @property
    def numel(self) -> int:
        """Number of values of the whole tensor."""
        return math.prod(self.spec.shape)

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return self.numel * self.spec.dtype.itemsize

    def fault(self) -> str | None:
        """Why the slices are not one whole tensor, or None."""
        if len(types := {part.dtype for part in self.slices}) > 1:
            return f"its slices have different types ({', '.join(sorted(map(type_name, types)))})"
        if _overlap(self.slices):
            return "its slices overlap"
        if sum(math.prod(part.shape) for part in self.slices) != self.numel:
            return "its slices leave a gap"
        return None


def _overlap(slices: Iterable[TensorSlice]) -> bool:
    """Whether any two slices overlap.

    Compares only slices that share an index of the first dimension: for a tensor that is split along it, the usual
    case, this takes little more than a sort.
    """
    filled = sorted((part for part in slices if 0 not in part.shape), key=attrgetter("offsets"))
    if filled and not filled[0].shape:
        return len(filled) > 1
    open_slices: list[TensorSlice] = []
    end = 0
    for part in filled:
        start = part.offsets[0]
        open_slices = [other for other in open_slices if other.ends[0] > start] if start < end else []
        if any(map(part.overlaps, open_slices)):
            return True
        open_slices.append(part)
        end = max(end, part.ends[0])
    return False


def faults(tensors: Mapping[str, StoredTensor], expected: Specs) -> Iterator[str]:
    """Which of these tensors are not whole or not as expected, or missing: one line each."""
    broken = {name: fault for name, tensor in tensors.items() if (fault := tensor.fault())}
    yield from (f"{name}: {fault}" for name, fault in broken.items())
    yield from differences(
        {name: tensor.spec for name, tensor in tensors.items() if name not in broken},
        {name: spec for name, spec in expected.items() if name not in broken},
    )


def open_tensors(file: Path) -> Any:
    """Open a tensor file; this reads its header.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error})") from None


def slices_in(file: Path, opened: Any) -> dict[str, TensorSlice]:
    """The slices in an opened tensor file, by the names of their tensors.

    Raises:
        UserError: the header does not describe slices of tensors.
    """
    try:
        places = json.loads((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
        found = {}
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            offsets = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
            if len(offsets) != len(shape):
                raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
            if stored.get_dtype() not in DTYPES:
                raise ValueError(f"{name} has the unknown type {stored.get_dtype()}")
            found[name] = TensorSlice(file, DTYPES[stored.get_dtype()], offsets, shape)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error})") from None


def assemble(files: Iterable[Mapping[str, TensorSlice]]) -> dict[str, StoredTensor]:
    """The tensors that the slices of all files make up, by name.

    Raises:
        UserError: slices of one tensor differ in their number of dimensions.
    """
    slices: dict[str, list[TensorSlice]] = {}
    for found in files:
        for name, part in found.items():
            parts = slices.setdefault(name, [])
            parts.append(part)
            if len(part.shape) != len(parts[0].shape):
                raise UserError(
                    f"{part.file}: damaged ({name} has {len(part.shape)} dimensions, in {parts[0].file.name} it has "
                    f"{len(parts[0].shape)})"
                )
    return {name: StoredTensor(tuple(parts)) for name, parts in slices.items()}
