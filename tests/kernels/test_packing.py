"""Packing: padded utterances to their valid frames, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.comparison import outputs_and_gradients
from w2vscale.kernels.packing import Lengths, Packing
from w2vscale.models.wav2vec2 import valid_mask


def lengths_of(frames: list[int]) -> Lengths:
    frames_B = torch.tensor(frames)
    return Lengths(frames_B, frames_B, sum(frames))


@given(frames=st.lists(st.integers(1, 9), min_size=1, max_size=5), padding=st.integers(0, 2))
def test_packed_frames_are_the_valid_ones_in_order(frames: list[int], padding: int) -> None:
    steps = max(frames) + padding
    x_BTD = torch.randn(len(frames), steps, 3)
    packing = Packing.of(x_BTD, lengths_of(frames))
    assert packing.bounds.dtype == torch.int32
    assert packing.bounds.tolist() == [sum(frames[:count]) for count in range(len(frames) + 1)]
    assert packing.steps == steps
    assert (packing.places_N is None) == (min(frames) == steps)
    packed_ND = packing.pack(x_BTD)
    assert torch.equal(packed_ND, torch.cat([row_TD[:count] for row_TD, count in zip(x_BTD, frames, strict=True)]))
    valid_BT = valid_mask(torch.tensor(frames), steps)
    assert torch.equal(packing.unpack(packed_ND), x_BTD * valid_BT.unsqueeze(2))
    mask = packing.mask()
    assert mask is None if packing.places_N is None else mask is not None and torch.equal(mask, valid_BT)


def test_gradients_reach_valid_frames_only() -> None:
    x_BTD = torch.randn(2, 4, 3, dtype=torch.float64)
    packing = Packing.of(x_BTD, lengths_of([2, 4]))
    packed_ND, of_x_BTD = outputs_and_gradients(packing.pack, [x_BTD])
    unpacked_BTD, of_packed_ND = outputs_and_gradients(packing.unpack, [packed_ND])
    assert not of_x_BTD[0, 2:].any() and of_x_BTD[0, :2].all() and of_x_BTD[1].all()
    assert not unpacked_BTD[0, 2:].any() and of_packed_ND.all()


@pytest.mark.parametrize("lengths", [None, lengths_of([7, 7])])
def test_without_padding_nothing_is_copied(lengths: Lengths | None) -> None:
    x_BTD = torch.randn(2, 7, 3)
    packing = Packing.of(x_BTD, lengths)
    assert packing.places_N is None and packing.mask() is None
    assert packing.bounds.tolist() == [0, 7, 14]
    assert packing.pack(x_BTD).data_ptr() == x_BTD.data_ptr()
    assert torch.equal(packing.unpack(packing.pack(x_BTD)), x_BTD)


def test_nothing_waits_for_a_device() -> None:
    """On the meta device no value can be read."""
    x_BTD = torch.empty(2, 7, 3, device="meta")
    frames_B = torch.empty(2, dtype=torch.long, device="meta")
    packing = Packing.of(x_BTD, Lengths(frames_B, frames_B, 10))
    assert packing.pack(x_BTD).shape == (10, 3)
    assert packing.unpack(packing.pack(x_BTD)).shape == x_BTD.shape
