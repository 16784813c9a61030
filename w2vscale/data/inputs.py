"""The tensors of one forward, how they travel, and how micro-batches are joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 64
"""Bytes, in a buffer of several tensors."""


class _Place(NamedTuple):
    """One tensor in a buffer."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes up to the next tensor."""
        return self.size + -self.size % ALIGNMENT


class PretrainingInputs(NamedTuple):
    """B utterances of at most S samples and T frames, with M masked frames in all.

    Masked frames are listed utterance by utterance: `utterance_M` and `frame_M` say which frame each is, `slot_M`
    its number among its utterance's masked frames, `negatives_MK` the slots of its K negatives.
    """

    waveforms_BS: Tensor
    lengths_B: Tensor  # samples
    frames_B: Tensor
    mask_BT: Tensor
    utterance_M: Tensor
    frame_M: Tensor
    slot_M: Tensor
    negatives_MK: Tensor
    utterances: tuple[int, ...]  # of each micro-batch that shares this forward
    masked: tuple[int, ...]  # masked frames of each
    slots: int  # most masked frames in an utterance
    padded: bool  # whether utterances differ in length

    @property
    def weights(self) -> tuple[int, ...]:
        """Each micro-batch's share of the loss denominator: its masked frames."""
        return self.masked


class CtcInputs(NamedTuple):
    """B utterances of at most S samples and T frames, with L labels in all, listed utterance by utterance."""

    waveforms_BS: Tensor
    lengths_B: Tensor  # samples
    frames_B: Tensor
    mask_BT: Tensor
    channel_mask_BD: Tensor
    labels_L: Tensor
    label_lengths_B: Tensor
    utterances: tuple[int, ...]  # of each micro-batch that shares this forward
    labels: tuple[int, ...]  # of each
    padded: bool  # whether utterances differ in length

    @property
    def weights(self) -> tuple[int, ...]:
        """Each micro-batch's share of the loss denominator: its labels."""
        return self.labels


Inputs = TypeVar("Inputs", PretrainingInputs, CtcInputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """A copy on `device`; asynchronous from pinned memory."""
    moved: list[Any] = [field.to(device, non_blocking=True) if isinstance(field, Tensor) else field for field in inputs]
    return type(inputs)(*moved)


def on_stream(inputs: PretrainingInputs | CtcInputs, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that `stream` reads them, not only the stream that they were copied on."""
    for field in inputs:
        if isinstance(field, Tensor):
            field.record_stream(stream)


def pack(inputs: PretrainingInputs | CtcInputs) -> tuple[Tensor, list[Any]]:
    """All tensors in one buffer of bytes, and what `unpack` needs beside it.

    Between processes and into pinned memory, one piece of memory goes in a fraction of the time of eight.
    """
    layout: list[Any] = [_Place(field.dtype, field.shape) if isinstance(field, Tensor) else field for field in inputs]
    buffer = torch.empty(sum(place.room for place in layout if isinstance(place, _Place)), dtype=torch.uint8)
    start = 0
    for field, place in zip(inputs, layout, strict=True):
        if isinstance(field, Tensor):
            buffer[start : start + place.size].view(place.dtype).view(place.shape).copy_(field)
            start += place.room
    return buffer, layout


def unpack(kind: type[Inputs], buffer: Tensor, layout: list[Any]) -> Inputs:
    """The inverse of `pack`: tensors that share `buffer`."""
    fields: list[Any] = []
    start = 0
    for place in layout:
        if not isinstance(place, _Place):
            fields.append(place)
            continue
        fields.append(buffer[start : start + place.size].view(place.dtype).view(place.shape))
        start += place.room
    return kind(*fields)


def pin(inputs: Inputs) -> Inputs:
    """A copy in pinned memory."""
    buffer, layout = pack(inputs)
    return unpack(type(inputs), buffer.pin_memory(), layout)


def concatenate_ctc(inputs: Sequence[CtcInputs]) -> CtcInputs:
    """Join micro-batches into one forward."""
    if len(inputs) == 1:
        return inputs[0]
    samples = max(part.waveforms_BS.shape[1] for part in inputs)
    frames = max(part.mask_BT.shape[1] for part in inputs)
    widths = {(part.waveforms_BS.shape[1], part.padded) for part in inputs}
    return CtcInputs(
        waveforms_BS=torch.cat([_pad(part.waveforms_BS, samples) for part in inputs]),
        lengths_B=torch.cat([part.lengths_B for part in inputs]),
        frames_B=torch.cat([part.frames_B for part in inputs]),
        mask_BT=torch.cat([_pad(part.mask_BT, frames) for part in inputs]),
        channel_mask_BD=torch.cat([part.channel_mask_BD for part in inputs]),
        labels_L=torch.cat([part.labels_L for part in inputs]),
        label_lengths_B=torch.cat([part.label_lengths_B for part in inputs]),
        utterances=tuple(count for part in inputs for count in part.utterances),
        labels=tuple(count for part in inputs for count in part.labels),
        padded=len(widths) > 1 or any(part.padded for part in inputs),
    )


def concatenate(inputs: Sequence[PretrainingInputs]) -> PretrainingInputs:
    """Join micro-batches into one forward; their losses stay apart through `utterances` and `masked`."""
    if len(inputs) == 1:
        return inputs[0]
    samples = max(part.waveforms_BS.shape[1] for part in inputs)
    frames = max(part.mask_BT.shape[1] for part in inputs)
    widths = {(part.waveforms_BS.shape[1], part.padded) for part in inputs}
    first = [sum(part.waveforms_BS.shape[0] for part in inputs[:i]) for i in range(len(inputs))]
    return PretrainingInputs(
        waveforms_BS=torch.cat([_pad(part.waveforms_BS, samples) for part in inputs]),
        lengths_B=torch.cat([part.lengths_B for part in inputs]),
        frames_B=torch.cat([part.frames_B for part in inputs]),
        mask_BT=torch.cat([_pad(part.mask_BT, frames) for part in inputs]),
        utterance_M=torch.cat([part.utterance_M + start for part, start in zip(inputs, first, strict=True)]),
        frame_M=torch.cat([part.frame_M for part in inputs]),
        slot_M=torch.cat([part.slot_M for part in inputs]),
        negatives_MK=torch.cat([part.negatives_MK for part in inputs]),
        utterances=tuple(count for part in inputs for count in part.utterances),
        masked=tuple(count for part in inputs for count in part.masked),
        slots=max(part.slots for part in inputs),
        padded=len(widths) > 1 or any(part.padded for part in inputs),
    )


def _pad(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (0, length - x.shape[1]))
