"""The tensors of one forward: how they are padded, travel between processes, and are joined.

What a forward takes is a NamedTuple of an objective's own, whose field `audio` is an `AudioBatch`. Its other fields are
tensors whose first dimension lists things utterance by utterance, or tuples of numbers that the host needs. So every
function here works for any objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from w2vscale.config import ModelConfig
from w2vscale.models.lengths import output_frames

ALIGNMENT = 64
"""Bytes between the beginnings of tensors in a shared buffer are a multiple of this."""

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a buffer."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes from its beginning to that of the next tensor."""
        return self.size + -self.size % ALIGNMENT


class AudioBatch(NamedTuple):
    """B utterances, padded to S samples and T frames."""

    waveforms_BS: Tensor
    lengths_B: Tensor  # samples
    frames_B: Tensor
    mask_BT: Tensor  # frames whose features are replaced by the mask embedding
    samples: tuple[int, ...]  # the lengths again, as numbers that the host can read without waiting for a device
    utterances: tuple[int, ...]  # number of utterances in each micro-batch that shares this forward

    @property
    def padded(self) -> bool:
        """Whether some utterance is shorter than the batch."""
        return min(self.samples) < self.waveforms_BS.shape[1]

    def per_micro_batch(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Sums over the utterances of each micro-batch, from a number for each utterance."""
        ends = accumulate(self.utterances, initial=0)
        return tuple(sum(counts[start:end]) for start, end in pairwise(ends))

    @property
    def lengths(self) -> tuple[Tensor | None, Tensor | None]:
        """`lengths_B` and `frames_B` for the encoder, or None where nothing is padded."""
        return (self.lengths_B, self.frames_B) if self.padded else (None, None)


class Inputs(Protocol):
    """What an objective's forward takes."""

    @property
    def audio(self) -> AudioBatch:
        """Padded utterances."""

    @property
    def weights(self) -> tuple[int, ...]:
        """Share of each micro-batch in the loss denominator, e.g. its number of masked frames."""


@dataclass(frozen=True)
class Utterance:
    """One utterance of a micro-batch, and what the objective has read from its cut."""

    waveform: NDArray[np.float32]
    target: Any
    place: int
    """Its place in the planned micro-batch, which its random draws depend on: leaving out another changes nothing."""


def audio_batch(waveforms: Sequence[NDArray[np.float32]], config: ModelConfig, *, width: int) -> AudioBatch:
    """Pad utterances to the longest, and to at least `width` samples. No frame is masked."""
    lengths = np.array([waveform.size for waveform in waveforms])
    padded = torch.zeros(len(waveforms), max(width, int(lengths.max())))
    for row_S, waveform in zip(padded, waveforms, strict=True):
        row_S[: waveform.size] = torch.from_numpy(waveform)
    frames = [output_frames(int(length), config) for length in lengths]
    return AudioBatch(
        waveforms_BS=padded,
        lengths_B=torch.from_numpy(lengths),
        frames_B=torch.tensor(frames),
        mask_BT=torch.zeros(len(waveforms), output_frames(padded.shape[1], config), dtype=torch.bool),
        samples=tuple(lengths.tolist()),
        utterances=(len(waveforms),),
    )


def join(parts: Sequence[T]) -> T:
    """Join the inputs of micro-batches for one forward.

    Tensors are padded to the same second dimension and concatenated; tuples of numbers are concatenated.
    """
    first: Any = parts[0]
    if len(parts) == 1:
        return parts[0]
    if isinstance(first, Tensor):
        tensors: Any = parts
        if first.dim() > 1:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [_pad(tensor, width) for tensor in tensors]
        joined: Any = torch.cat(tensors)
    elif _is_named(first):
        joined = type(first)(*(join(fields) for fields in zip(*parts, strict=True)))
    else:
        joined = tuple(number for part in parts for number in part)  # type: ignore[attr-defined]
    result: T = joined
    return result


def to_device(inputs: T, device: torch.device) -> T:
    """A copy on `device`; asynchronous from pinned memory."""
    return _replace(Tensor, lambda tensor: tensor.to(device, non_blocking=True), inputs)


def tensors_of(inputs: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `inputs` with the name of its field."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif _is_named(inputs):
        for field, value in zip(inputs._fields, inputs, strict=True):  # type: ignore[attr-defined, call-overload]
            yield from tensors_of(value, field)


def pack(inputs: object) -> tuple[Tensor, Any]:
    """All tensors in one buffer of bytes, and what `unpack` needs beside it.

    Between processes and into pinned memory, one piece of memory moves in a fraction of the time of eight.
    """
    layout = _replace(Tensor, lambda tensor: Place(tensor.dtype, tensor.shape), inputs)
    tensors = [tensor for _, tensor in tensors_of(inputs)]
    places = [Place(tensor.dtype, tensor.shape) for tensor in tensors]
    buffer = torch.empty(sum(place.room for place in places), dtype=torch.uint8)
    start = 0
    for tensor, place in zip(tensors, places, strict=True):
        buffer[start : start + place.size].view(place.dtype).view(place.shape).copy_(tensor)
        start += place.room
    return buffer, layout


def unpack(buffer: Tensor, layout: Any) -> Any:
    """The inverse of `pack`: inputs whose tensors share `buffer`."""
    start = 0

    def take(place: Place) -> Tensor:
        nonlocal start
        begin, start = start, start + place.room
        return buffer[begin : begin + place.size].view(place.dtype).view(place.shape)

    return _replace(Place, take, layout)


def pin(inputs: T) -> T:
    """A copy in pinned memory."""
    buffer, layout = pack(inputs)
    pinned: T = unpack(buffer.pin_memory(), layout)
    return pinned


def _replace(kind: type[Any], change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every part of type `kind` changed, in named tuples of any depth."""
    if isinstance(value, kind):
        return change(value)
    if _is_named(value):
        return type(value)(*(_replace(kind, change, field) for field in value))
    return value


def _is_named(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _pad(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[1]
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, missing)) if missing else tensor
