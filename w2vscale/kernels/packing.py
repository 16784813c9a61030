"""Utterances of different lengths without their padding: what the blocks of the transformer compute on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Lengths(NamedTuple):
    """Lengths of B utterances, of which some are padded."""

    samples_B: Tensor
    frames_B: Tensor
    frames: int | None  # the sum of frames_B, known to the host without waiting for a device; None: stay padded


class Packing(NamedTuple):
    """Maps B utterances, padded to T frames, to their N valid frames one after another, and back.

    Nothing here makes the host wait for a device. A graph for other libraries is traced with utterances that stay
    padded, because N would be a size that depends on data. Only plain operations take these.
    """

    bounds: Tensor  # [B + 1] int32: utterance b has the packed frames from bounds[b] to bounds[b + 1]
    steps: int  # T
    places_N: Tensor | None  # of each valid frame among all B x T frames; None where no frame is left out
    valid_BT: Tensor | None = None  # True inside each utterance, if utterances stay padded: N is B x T

    @staticmethod
    def of(x_BTD: Tensor, lengths: Lengths | None) -> Packing:
        """The packing of a batch; without `lengths` no utterance is padded."""
        batch, steps = x_BTD.shape[:2]
        starts_B = torch.arange(0, batch * steps + 1, steps, dtype=torch.int32, device=x_BTD.device)
        if lengths is None or lengths.frames == batch * steps:
            return Packing(starts_B, steps, None)
        if lengths.frames is None:
            return Packing(starts_B, steps, None, _inside(lengths.frames_B, steps))
        ends_B = lengths.frames_B.cumsum(0)
        before_B = starts_B[:-1] - (ends_B - lengths.frames_B)  # padding in front of each utterance
        places_N = torch.arange(lengths.frames, device=x_BTD.device) + torch.repeat_interleave(
            before_B, lengths.frames_B, output_size=lengths.frames
        )
        return Packing(F.pad(ends_B, (1, 0)).int(), steps, places_N)

    def pack(self, x_BTD: Tensor) -> Tensor:
        """The valid frames [N, …] of x [B, T, …]."""
        x_ND = x_BTD.flatten(0, 1)
        if self.places_N is not None:
            x_ND = _Select.apply(x_ND, self.places_N)
        return x_ND

    def unpack(self, x_ND: Tensor) -> Tensor:
        """Frames [B, T, …], zeros where an utterance is padded, from its valid frames [N, …]."""
        batch = self.bounds.shape[0] - 1
        if self.places_N is not None:
            x_ND = _spread(x_ND, self.places_N, batch * self.steps)
        x_BTD = x_ND.unflatten(0, (batch, self.steps))
        if self.valid_BT is not None:
            x_BTD = x_BTD * self.valid_BT[(..., *[None] * (x_BTD.dim() - 2))]
        return x_BTD

    def mask(self) -> Tensor | None:
        """[B, T] bool: True inside each utterance; None where no frame is padding."""
        if self.places_N is None:
            return self.valid_BT
        return _inside(self.bounds.diff(), self.steps)


def _inside(frames_B: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=frames_B.device) < frames_B.unsqueeze(1)


class _Select(torch.autograd.Function):
    """The rows of x at `places`, which are distinct: the gradient is written, not added."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.rows = x_RD.shape[0]
        return x_RD.index_select(0, places_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places_N,) = ctx.saved_tensors
        return _spread(gradients[0], places_N, ctx.rows), None


def _spread(x_ND: Tensor, places_N: Tensor, rows: int) -> Tensor:
    """`rows` rows: those of x at `places`, and zeros."""
    return x_ND.new_zeros(rows, *x_ND.shape[1:]).index_copy(0, places_N, x_ND)
