"""What the tensor files of a checkpoint hold, from their headers: which part of which tensor is in which file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import add, attrgetter
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from w2vscale.errors import UserError

BYTES_PER_VALUE = 4
"""Everything in a checkpoint is fp32."""


class Shard(NamedTuple):
    """A block of a tensor, in one file."""

    file: Path
    dtype: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the block ends in the whole tensor."""
        return tuple(map(add, self.offsets, self.shape))

    def overlaps(self, other: Shard) -> bool:
        """Whether some value of the tensor is in both."""
        return all(
            max(start, other_start) < min(end, other_end)
            for start, other_start, end, other_end in zip(
                self.offsets, other.offsets, self.ends, other.ends, strict=True
            )
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    shards: tuple[Shard, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As far as the shards reach."""
        return tuple(max(ends) for ends in zip(*(shard.ends for shard in self.shards), strict=True))

    @property
    def numel(self) -> int:
        """Number of values of the whole tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return BYTES_PER_VALUE * self.numel

    def fault(self) -> str | None:
        """Why the shards are not one whole tensor, or None."""
        if wrong := {shard.dtype for shard in self.shards} - {"F32"}:
            return f"has the type {min(wrong)}, not F32"
        if _overlap(self.shards):
            return "its shards overlap"
        if sum(math.prod(shard.shape) for shard in self.shards) != self.numel:
            return "its shards leave out a part of it"
        return None


def _overlap(shards: Iterable[Shard]) -> bool:
    """Whether any two shards overlap. Only those that share a row are compared: what is split by rows takes little more
    than a sort."""
    filled = sorted((shard for shard in shards if 0 not in shard.shape), key=attrgetter("offsets"))
    if filled and not filled[0].shape:
        return len(filled) > 1
    sharing: list[Shard] = []
    end = 0
    for shard in filled:
        row = shard.offsets[0]
        sharing = [other for other in sharing if other.ends[0] > row] if row < end else []
        if any(map(shard.overlaps, sharing)):
            return True
        sharing.append(shard)
        end = max(end, row + shard.shape[0])
    return False


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's tensor files, by name.

    Raises:
        UserError: a file is damaged.
    """
    return assembled(map(shards_in, files))


def assembled(files: Iterable[Mapping[str, Shard]]) -> dict[str, StoredTensor]:
    """The tensors that the shards of all files make, by name.

    Raises:
        UserError: shards of one tensor differ in their number of dimensions.
    """
    shards: dict[str, list[Shard]] = {}
    for found in files:
        for name, shard in found.items():
            parts = shards.setdefault(name, [])
            parts.append(shard)
            if len(shard.shape) != len(parts[0].shape):
                raise UserError(f"{shard.file}: damaged ({name} has other dimensions than in {parts[0].file.name})")
    return {name: StoredTensor(tuple(parts)) for name, parts in shards.items()}


def tensor_files(path: Path) -> list[Path]:
    """The tensor files of a checkpoint."""
    return sorted(path.glob("*.safetensors"))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Whole shape of every tensor in a checkpoint.

    Raises:
        UserError: a file is damaged.
    """
    return {name: tensor.shape for name, tensor in stored_tensors(tensor_files(path)).items()}


def shards_in(file: Path) -> dict[str, Shard]:
    """What one file holds, from its header.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            places = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            found = {}
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                stored = tensors.get_slice(name)
                shape = tuple(stored.get_shape())
                offsets = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
                if len(offsets) != len(shape):
                    raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
                found[name] = Shard(file, stored.get_dtype(), offsets, shape)
            return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error})") from None
