"""Masks and negatives: how many, where, and how evenly drawn."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.batches import inputs_of, utterance_of_masked_frames
from w2vscale.config import load_config
from w2vscale.models.lengths import input_samples, output_frames
from w2vscale.objectives import Objective, StepContext, build_objective
from w2vscale.objectives.contrastive import ContrastiveInputs
from w2vscale.objectives.masking import MaskSettings, Spans, draw_masks, span_mask
from w2vscale.objectives.similarity import contrastive_logits, contrastive_loss, negative_indices

BASE = build_objective(load_config("base")).settings


def with_masking(**settings: float) -> MaskSettings:
    return MaskSettings(name="any", **settings)  # type: ignore[arg-type]


def frame_mask(frames: int, settings: MaskSettings, draws: np.random.Generator) -> NDArray[np.bool_]:
    spans = Spans(settings.mask_probability, settings.mask_length, settings.mask_min_spans)
    (mask,) = draw_masks([frames], spans, [draws], trimmed=False)
    return mask


def spans_of(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, end) of each unbroken run of masked frames."""
    edges = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def assert_uniform(counts: NDArray[np.integer]) -> None:
    """Pearson's chi-square, at most six standard deviations above its mean."""
    expected = counts.mean()
    statistic = float(((counts - expected) ** 2).sum() / expected)
    freedom = counts.size - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


# ---------------------------------------------------------------- masks


def test_about_49_percent_of_the_frames_are_masked() -> None:
    """10,000 utterances as long as LibriSpeech's: 2 to 16 seconds, most of them near the long end."""
    draws = np.random.default_rng(0)
    seconds = 2.0 + 14.0 * draws.beta(3.0, 1.2, size=10_000)
    model = load_config("base").model
    frames = [output_frames(int(length * 16_000), model) for length in seconds]
    masked = [int(frame_mask(count, BASE, draws).sum()) for count in frames]
    assert sum(masked) / sum(frames) == pytest.approx(0.49, abs=0.01)


@given(
    frames=st.integers(0, 400),
    length=st.integers(1, 30),
    probability=st.floats(0.01, 1.0),
    least=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_a_mask_consists_of_spans_inside_the_utterance(
    frames: int, length: int, probability: float, least: int, seed: int
) -> None:
    config = with_masking(mask_length=length, mask_probability=probability, mask_min_spans=least)
    mask = frame_mask(frames, config, np.random.default_rng(seed))
    assert mask.shape == (frames,) and mask.dtype == np.bool_
    most = max(math.ceil(probability * frames / length), least)
    assert mask.sum() >= min(length + least - 1, frames - 1)  # starts differ, so each span adds a frame
    assert mask.sum() <= most * length
    runs = spans_of(mask)
    assert len(runs) <= most
    if frames - length > most:
        assert all(end - start >= length for start, end in runs)
        assert runs[-1][1] <= frames - 1  # the last possible start is frames - length - 1


@pytest.mark.parametrize(("frames", "spans"), [(1, 2), (2, 2), (3, 2), (11, 2), (12, 2), (13, 2), (40, 31)])
def test_short_utterances_are_masked_as_in_fairseq(frames: int, spans: int) -> None:
    """There, `spans` starts come from [0, frames - 10), or from [0, spans] if those are not more than `spans`."""
    starts = frames - 10 if frames - 10 > spans else spans + 1
    places = [
        {place for start in chosen for place in range(start, start + 10)}
        for chosen in combinations(range(starts), spans)
    ]
    possible = {tuple(sorted(place for place in each if place < frames)) for each in places}
    draws = np.random.default_rng(0)
    seen = {
        tuple(np.flatnonzero(span_mask(frames, Spans(1e-9, 10, spans), 0.5, draws)).tolist())
        for _ in range(2000 if spans == 2 else 1)
    }
    assert seen <= possible
    assert spans > 2 or seen == possible


def test_an_utterance_of_eleven_frames_is_learned_from() -> None:
    """Two of the starts 0, 1 and 2: at least ten frames are masked."""
    waveform = np.random.default_rng(0).standard_normal(input_samples(11, load_config("base").model))
    inputs = inputs_of(build_objective(load_config("base")), [waveform.astype(np.float32)], number=0, seed=0)
    assert inputs.audio.frames == (11,) and inputs.masked[0] >= 10


def test_starts_are_uniform_over_the_whole_range() -> None:
    config = with_masking(mask_probability=1e-6, mask_min_spans=1)
    draws = np.random.default_rng(1)
    counts = np.zeros(50, dtype=np.int64)
    for _ in range(20_000):
        ((start, end),) = spans_of(frame_mask(60, config, draws))
        assert end - start == 10
        counts[start] += 1
    assert counts.min() > 0
    assert_uniform(counts)


def test_starts_are_drawn_without_replacement_and_their_number_is_rounded_at_random() -> None:
    """Spans of one frame make the number of spans visible: 0.33 × 50 = 16.5 is 16 or 17."""
    config = with_masking(mask_length=1, mask_probability=0.33)
    draws = np.random.default_rng(2)
    spans = np.array([int(frame_mask(50, config, draws).sum()) for _ in range(4000)])
    assert set(spans.tolist()) == {16, 17}
    assert spans.mean() == pytest.approx(16.5, abs=0.04)  # five standard deviations


def test_there_are_at_least_two_spans() -> None:
    config = with_masking(mask_length=1, mask_probability=1e-6)
    draws = np.random.default_rng(3)
    assert {int(frame_mask(40, config, draws).sum()) for _ in range(200)} == {2}


def test_equal_generators_give_equal_masks() -> None:
    first, second = (frame_mask(500, BASE, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(first, second)


# ---------------------------------------------------------------- negatives


@given(masked=st.integers(2, 600), negatives=st.integers(1, 120), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_negatives_are_other_masked_frames(masked: int, negatives: int, seed: int) -> None:
    drawn = negative_indices(masked, negatives, np.random.default_rng(seed))
    assert drawn.shape == (masked, negatives)
    assert drawn.min() >= 0 and drawn.max() < masked
    assert not (drawn == np.arange(masked)[:, None]).any()


def test_negatives_are_uniform_over_the_others() -> None:
    masked = 12
    draws = np.random.default_rng(4)
    counts = np.zeros((masked, masked), dtype=np.int64)
    for own, row in enumerate(negative_indices(masked, 30_000, draws)):
        counts[own] = np.bincount(row, minlength=masked)
    assert (np.diag(counts) == 0).all()
    for own in range(masked):
        assert_uniform(np.delete(counts[own], own))


def test_negatives_of_different_frames_are_drawn_apart() -> None:
    drawn = negative_indices(200, 100, np.random.default_rng(5))
    assert np.unique(drawn, axis=0).shape[0] == 200


@pytest.mark.parametrize("masked", [0, 1])
def test_without_another_masked_frame_the_shape_is_kept(masked: int) -> None:
    drawn = negative_indices(masked, 100, np.random.default_rng(0))
    assert drawn.shape == (masked, 100) and not drawn.any()


def test_inputs_list_negatives_of_the_same_utterance() -> None:
    waveforms = [np.ones(size, dtype=np.float32) for size in (20_000, 40_000, 399, 30_000)]
    inputs = inputs_of(build_objective(load_config("base", ["objective.negatives=20"])), waveforms, number=3, seed=8)
    mask_BT, utterance_M = inputs.audio.mask_BT, utterance_of_masked_frames(inputs)
    counts = mask_BT.sum(dim=1)
    assert counts[2] == 0  # has no frame
    assert torch.equal(mask_BT[utterance_M, inputs.frame_M], torch.ones(sum(inputs.masked)).bool())
    assert inputs.masked == tuple(counts.tolist())
    for row, count in enumerate(counts.tolist()):
        own = utterance_M == row
        assert torch.equal(inputs.slot_M[own], torch.arange(count))
        assert (inputs.negatives_MK[own] < count).all()
        assert (inputs.negatives_MK[own] != inputs.slot_M[own].unsqueeze(1)).all()
        assert not mask_BT[row, int(inputs.audio.frames_B[row]) :].any()


# ---------------------------------------------------------------- an utterance with one masked frame


def one_masked_frame(objective: Objective) -> ContrastiveInputs:
    """Two utterances, the second with one masked frame."""
    waveforms = [np.random.default_rng(0).standard_normal(3_000, dtype=np.float32)] * 2
    inputs: ContrastiveInputs = inputs_of(objective, waveforms)
    utterance_M = utterance_of_masked_frames(inputs)
    keep = (utterance_M == 0) | (inputs.slot_M == 0)
    mask_BT = torch.zeros_like(inputs.audio.mask_BT)
    mask_BT[utterance_M[keep], inputs.frame_M[keep]] = True
    negatives_MK = inputs.negatives_MK[keep]
    negatives = objective.settings.negatives
    negatives_MK[-1] = torch.from_numpy(negative_indices(1, negatives, np.random.default_rng(0)))[0]
    masked = (inputs.masked[0], 1)
    return inputs._replace(
        audio=inputs.audio._replace(mask_BT=mask_BT),
        masked_B=torch.tensor(masked),
        frame_M=inputs.frame_M[keep],
        slot_M=inputs.slot_M[keep],
        negatives_MK=negatives_MK,
        masked=masked,
    )


def test_a_single_masked_frame_has_no_negatives_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    context_MD, targets_MD = torch.randn(2, 1, 8, requires_grad=True)
    context_MD.retain_grad()
    logits_MK = contrastive_logits(
        context_MD,
        targets_MD,
        torch.tensor([5]),
        utterance_M=torch.tensor([0]),
        slot_M=torch.tensor([0]),
        negatives_MK=torch.zeros(1, 100, dtype=torch.int16),
        utterances=1,
        slots=1,
        temperature=0.1,
    )
    assert torch.isneginf(logits_MK[:, 1:]).all()
    loss, _ = contrastive_loss(logits_MK)
    loss.backward()
    assert loss.item() == 0.0
    assert context_MD.grad is not None and not context_MD.grad.any()


def test_an_utterance_with_one_masked_frame_adds_nothing_to_the_contrastive_loss() -> None:
    encoder = ["model.conv_layers=[[16,10,5],[16,3,2],[16,2,2]]", "model.conv_norm_groups=16", "model.layers=1"]
    objective = build_objective(load_config("tiny", encoder))
    torch.manual_seed(0)
    model = objective.build_model().eval()
    both = one_masked_frame(objective)
    first = both._replace(
        audio=both.audio._replace(
            waveforms_BS=both.audio.waveforms_BS[:1],
            lengths_B=both.audio.lengths_B[:1],
            frames_B=both.audio.frames_B[:1],
            mask_BT=both.audio.mask_BT[:1],
            samples=both.audio.samples[:1],
            frames=both.audio.frames[:1],
            utterances_K=torch.tensor([1]),
            utterances=(1,),
        ),
        masked_B=both.masked_B[:1],
        frame_M=both.frame_M[:-1],
        slot_M=both.slot_M[:-1],
        negatives_MK=both.negatives_MK[:-1],
        masked=both.masked[:1],
    )
    step = StepContext(seed=0, update=0)
    with torch.no_grad():
        expected, sums = (objective.forward(model, inputs, step=step, training=False) for inputs in (first, both))
    assert expected.contrastive > 1.0
    torch.testing.assert_close(sums.contrastive, expected.contrastive, rtol=1e-5, atol=0)
    assert sums.masked == expected.masked + 1
