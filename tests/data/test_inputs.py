"""The inputs of a forward: padded, joined, and moved between processes in one piece, for any objective."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.batches import inputs_of, same_inputs
from w2vscale.config import load_config
from w2vscale.data.inputs import ALIGNMENT, AudioBatch, audio_batch, join, pack, tensors_of, to_device, unpack
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.models.lengths import output_frames
from w2vscale.objectives import build_objective

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool, torch.uint8)
CONFIG = load_config("tiny")
OBJECTIVE = build_objective(CONFIG)


class Inner(NamedTuple):
    """Tensors with one, two and three dimensions, and numbers of the host."""

    one_B: Tensor
    two_BT: Tensor
    three_BTC: Tensor
    numbers: tuple[int, ...]


class Outer(NamedTuple):
    """Inputs within inputs."""

    audio: AudioBatch
    first: Inner
    second: Inner
    labels_L: Tensor
    counts: tuple[int, ...]


def tensor(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Random numbers of any type, none of them zero, so that they differ from padding."""
    numbers = torch.from_numpy(np.random.default_rng(seed).integers(1, 100, shape))
    return numbers.to(dtype)


@st.composite
def outers(draw: Any, *, dtypes: tuple[torch.dtype, ...] | None = None) -> Outer:
    """Inputs of 1 to 3 utterances, of any sizes, also empty ones."""
    seed = draw(st.integers(0, 1000))
    lengths = draw(st.lists(st.integers(400, 3000), min_size=1, max_size=3))
    rows, labels = len(lengths), draw(st.integers(0, 5))
    width, channels = draw(st.integers(0, 6)), 3
    kinds = dtypes or tuple(draw(st.tuples(*[st.sampled_from(DTYPES)] * 3)))

    def inner(offset: int) -> Inner:
        return Inner(
            tensor(kinds[0], rows, seed=seed + offset),
            tensor(kinds[1], rows, width, seed=seed + offset),
            tensor(kinds[2], rows, width + offset, channels, seed=seed + offset),
            tuple(range(rows)),
        )

    audio = audio_batch([np.full(length, 0.5, np.float32) for length in lengths], CONFIG.model, width=0)
    return Outer(audio, inner(0), inner(1), tensor(torch.int64, labels, seed=seed), (labels,))


class TestPack:
    @given(inputs=outers())
    def test_unpack_is_its_inverse(self, inputs: Outer) -> None:
        buffer, layout = pack(inputs)
        again = unpack(buffer, layout)
        assert same_inputs(again, inputs)
        assert all(tensor.untyped_storage().data_ptr() == buffer.data_ptr() for _, tensor in tensors_of(again))

    @given(inputs=outers())
    def test_tensors_lie_one_after_another_at_aligned_places(self, inputs: Outer) -> None:
        buffer, layout = pack(inputs)
        ends = 0
        for _, tensor in tensors_of(unpack(buffer, layout)):
            start = tensor.storage_offset() * tensor.element_size()
            assert start % ALIGNMENT == 0 and (start >= ends or not tensor.numel())
            ends = start + tensor.numel() * tensor.element_size()
        assert ends <= buffer.numel() and buffer.numel() % ALIGNMENT == 0

    @given(inputs=outers())
    def test_a_micro_batch_survives_pickling(self, inputs: Outer) -> None:
        batch = MicroBatch(3, inputs, 100, (BadAudio("u", "f", "silent", "is silent"),))  # type: ignore[arg-type]
        again = pickle.loads(pickle.dumps(batch))
        assert same_inputs(again.inputs, inputs)
        assert (again.number, again.audio_samples, again.bad) == (batch.number, batch.audio_samples, batch.bad)

    def test_a_tensor_that_is_not_contiguous_is_copied_in_order(self) -> None:
        turned = torch.arange(6).view(2, 3).t()
        assert torch.equal(unpack(*pack(turned)), turned)


class TestJoin:
    @given(parts=st.lists(outers(dtypes=(torch.int64, torch.float32, torch.bool)), min_size=1, max_size=4))
    def test_utterances_follow_one_another_padded_with_zeros(self, parts: list[Outer]) -> None:
        joined = join(parts)
        assert type(joined) is Outer and type(joined.first) is Inner
        for name in ("first", "second"):
            inner = getattr(joined, name)
            assert torch.equal(inner.one_B, torch.cat([getattr(part, name).one_B for part in parts]))
            assert inner.numbers == sum((getattr(part, name).numbers for part in parts), ())
            for field in ("two_BT", "three_BTC"):
                tensors = [getattr(getattr(part, name), field) for part in parts]
                found, row = getattr(inner, field), 0
                assert found.shape[1] == max(tensor.shape[1] for tensor in tensors)
                for tensor in tensors:
                    rows = found[row : row + tensor.shape[0]]
                    assert torch.equal(rows[:, : tensor.shape[1]], tensor)
                    assert not rows[:, tensor.shape[1] :].any()
                    row += tensor.shape[0]
                assert row == found.shape[0]
        assert torch.equal(joined.labels_L, torch.cat([part.labels_L for part in parts]))
        assert joined.counts == tuple(part.counts[0] for part in parts)

    @given(parts=st.lists(outers(dtypes=(torch.int64, torch.float32, torch.bool)), min_size=2, max_size=4))
    def test_it_is_associative(self, parts: list[Outer]) -> None:
        assert same_inputs(join([join(parts[:1]), join(parts[1:])]), join(parts))
        assert same_inputs(join([join(parts[:-1]), parts[-1]]), join(parts))

    @given(parts=st.lists(outers(), min_size=1, max_size=1))
    def test_one_part_stays_as_it_is(self, parts: list[Outer]) -> None:
        assert join(parts) is parts[0]

    @given(sizes=st.lists(st.lists(st.integers(400, 30_000), max_size=3), min_size=1, max_size=4))
    def test_the_weights_of_micro_batches_stay_apart(self, sizes: list[list[int]]) -> None:
        parts = [
            inputs_of(OBJECTIVE, [np.ones(size, np.float32) for size in each], number=number)
            for number, each in enumerate(sizes)
        ]
        joined = join(parts)
        assert joined.weights == tuple(part.weights[0] for part in parts)
        assert joined.audio.utterances == tuple(part.audio.utterances[0] for part in parts)
        assert joined.audio.samples == tuple(joined.audio.lengths_B.tolist())
        assert joined.audio.padded == bool((joined.audio.lengths_B < joined.audio.waveforms_BS.shape[1]).any())


class TestAudioBatch:
    @given(lengths=st.lists(st.integers(400, 5000), min_size=1, max_size=4), width=st.integers(0, 6000))
    def test_utterances_are_padded_with_zeros_and_not_masked(self, lengths: list[int], width: int) -> None:
        found = audio_batch([np.ones(length, np.float32) for length in lengths], CONFIG.model, width=width)
        samples = max(width, *lengths)
        assert found.waveforms_BS.shape == (len(lengths), samples)
        assert found.waveforms_BS.sum(dim=1).tolist() == lengths == list(found.samples)
        assert found.frames_B.tolist() == [output_frames(length, CONFIG.model) for length in lengths]
        assert found.mask_BT.shape == (len(lengths), output_frames(samples, CONFIG.model)) and not found.mask_BT.any()
        assert found.frames == tuple(found.frames_B.tolist())
        if min(lengths) == samples:
            assert found.lengths is None
        else:
            assert found.lengths is not None
            assert found.lengths[0] is found.lengths_B and found.lengths[1] is found.frames_B
            assert found.lengths.frames == sum(found.frames)


def test_tensors_are_named_by_their_field() -> None:
    inputs = inputs_of(OBJECTIVE, [np.ones(20_000, np.float32)])
    names = [name for name, _ in tensors_of(inputs)]
    assert names[:4] == ["waveforms_BS", "lengths_B", "frames_B", "mask_BT"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_tensors_move_to_a_device(device: str) -> None:
    inputs = inputs_of(OBJECTIVE, [np.ones(20_000, np.float32)])
    moved = to_device(inputs, torch.device(device))
    assert {tensor.device.type for _, tensor in tensors_of(moved)} == {device}
    assert (moved.masked, moved.audio.samples) == (inputs.masked, inputs.audio.samples)
