"""The result depends neither on padding or other utterances of a batch, nor on joined forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.batches import inputs_of
from tests.helpers.families import (
    FAMILIES,
    assert_close,
    assert_close_gradients,
    assert_close_sums,
    batch,
    build,
    family,
    gradients,
    noise,
    sums_of,
)
from w2vscale.data.inputs import audio_batch, join
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.models.wav2vec2 import EncoderOutput
from w2vscale.objectives import StepContext, add_sums
from w2vscale.objectives.contrastive import ContrastiveSums, Wav2Vec2ForPretraining
from w2vscale.objectives.quantizer import diversity_loss

# ---------------------------------------------------------------- padding


@torch.no_grad()
def encode(model: Wav2Vec2ForPretraining, waveforms: Sequence[NDArray[np.float32]]) -> tuple[EncoderOutput, list[int]]:
    """Encode a padded batch. Returns the output, and the number of frames of each utterance."""
    audio = audio_batch(waveforms, model.encoder.config, width=0)
    return model.encoder(audio.waveforms_BS, audio.lengths), list(audio.frames)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("company", [(3000,), (2001, 5000), (2017, 2333, 9999, 2016), (2018,)])
def test_an_utterance_gives_the_same_frames_alone_and_in_any_padded_batch(name: str, company: tuple[int, ...]) -> None:
    model = build(family(name)).eval()
    (waveform,) = noise(2017, seed=3)
    alone, (frames,) = encode(model, [waveform])
    together, counts = encode(model, [*noise(*company), waveform])
    assert counts[-1] == frames == alone.features_BTC.shape[1]
    pairs = [
        (together.features_BTC, alone.features_BTC),
        (together.normalised_BTC, alone.normalised_BTC),
        (together.projected_BTD, alone.projected_BTD),
        *zip(together.hidden, alone.hidden, strict=True),
        (together.context_BTD, alone.context_BTD),
    ]
    for in_company, by_itself in pairs:
        assert_close(in_company[-1, :frames], by_itself[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_length_has_as_many_frames_as_the_encoder_makes(name: str) -> None:
    model = build(family(name)).eval()
    for samples in range(400, 480, 7):
        encoded, (frames,) = encode(model, noise(samples))
        assert encoded.features_BTC.shape[1] == frames


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_of_a_padded_batch_are_those_of_its_utterances_alone(name: str) -> None:
    """The contrastive loss is the sum over utterances, and their codes are the same."""
    objective = family(name)
    model = build(objective).eval()
    waveforms = noise(2000, 3100, 2600)
    together = model(inputs_of(objective, waveforms, seed=1))
    alone = [
        model(inputs_of(objective, [waveform], places=[place], seed=1)) for place, waveform in enumerate(waveforms)
    ]
    assert together.contrastive > 1.0
    torch.testing.assert_close(together.contrastive, sum(sums.contrastive for sums in alone), rtol=1e-5, atol=0)
    assert torch.equal(together.code_counts_GV, sum(sums.code_counts_GV for sums in alone))


def test_the_longest_input_is_enforced() -> None:
    model = build(family("base_prenorm", "model.max_frames=40")).eval()
    with pytest.raises(ValueError, match="the model takes at most 40"):
        encode(model, noise(4000))


@pytest.mark.parametrize("name", ["base", "base_prenorm"])
@pytest.mark.parametrize("sizes", [(400,), (3, 4, 1, 900, 92), (700, 6, 294)])
def test_statistics_of_group_norm_can_be_computed_in_blocks(name: str, sizes: tuple[int, ...]) -> None:
    """They are those of the whole waveform, so that its parts can then be encoded separately."""
    encoder = build(family(name)).encoder.feature_encoder
    waveform_S = 0.5 + torch.from_numpy(noise(sum(sizes))[0])
    whole_1TC = encoder(waveform_S.unsqueeze(0), None)
    statistics = encoder.statistics(waveform_S.split(sizes))
    assert_close(encoder(waveform_S.unsqueeze(0), None, statistics), whole_1TC)


# ---------------------------------------------------------------- joined forwards


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_joined_micro_batches_have_the_losses_and_gradients_of_separate_forwards(name: str, training: bool) -> None:
    objective = family(name, "objective.feature_penalty_weight=3")
    model = build(objective).train(training)
    # Different widths; one padded, one not; numbers out of order.
    sizes = {7: (2000, 2600), 2: (3001, 3001), 9: (1900,)}
    parts = [batch(objective, *samples, number=number) for number, samples in sizes.items()]
    joined = sums_of(objective, model, *parts, numbers=tuple(sizes))
    separate = [sums_of(objective, model, part, numbers=(number,)) for number, part in zip(sizes, parts, strict=True)]
    summed = reduce(add_sums, separate)
    assert_close_sums(joined, summed)
    assert_close_gradients(gradients(model, joined.total), gradients(model, summed.total))


@torch.no_grad()
def test_diversity_is_computed_per_micro_batch() -> None:
    """Joining two micro-batches that use different codes does not make either of them more diverse."""
    objective = family("base")
    model = build(objective).eval()
    parts = [batch(objective, 2000, number=number) for number in (0, 1)]
    quantized = []
    model.quantizer.register_forward_hook(lambda module, args, output: quantized.append(output))
    joined = sums_of(objective, model, *parts)
    first_MGV, second_MGV = quantized[0].logits_MGV.softmax(dim=2).split(list(join(parts).weights))
    parts_KGV = torch.stack([part_MGV.mean(dim=0) for part_MGV in (first_MGV, second_MGV)])
    expected = diversity_loss(parts_KGV) @ torch.tensor([float(len(first_MGV)), float(len(second_MGV))])
    of_all = diversity_loss(torch.cat([first_MGV, second_MGV]).mean(dim=0, keepdim=True)) * joined.masked
    torch.testing.assert_close(joined.diversity, expected)
    assert float((of_all - joined.diversity).abs()) > 1e-3 * float(joined.diversity)


def test_gumbel_noise_belongs_to_the_micro_batch() -> None:
    objective = family("base")
    parts = {7: batch(objective, 2000, 2600, number=7), 2: batch(objective, 3001, number=2)}
    joined_MGV = objective._gumbel_noise(join([*parts.values()]), StepContext(3, 0, (7, 2)))
    separate = [objective._gumbel_noise(part, StepContext(3, 0, (number,))) for number, part in parts.items()]
    assert torch.equal(joined_MGV, torch.cat(separate))
    assert not torch.equal(separate[1], objective._gumbel_noise(parts[2], StepContext(4, 0, (2,))))
    assert joined_MGV.isfinite().all()
    assert joined_MGV.mean().item() == pytest.approx(0.5772, abs=0.05)  # Euler's constant
    assert joined_MGV.var().item() == pytest.approx(math.pi**2 / 6, abs=0.1)


# ---------------------------------------------------------------- an empty micro-batch


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_micro_batch_without_utterances_weighs_nothing(name: str, precision: str) -> None:
    objective = family(name, "objective.feature_penalty_weight=3", f"precision.compute={precision}")
    model = build(objective).train()
    empty = batch(objective)
    assert (MicroBatch(0, empty, audio_samples=0).utterances, empty.weights, empty.masked) == (0, (0,), (0,))
    sums = sums_of(objective, model, empty)
    for field, value in zip(ContrastiveSums._fields, sums, strict=True):
        assert not value.any() and value.isfinite().all(), field
    found = gradients(model, sums.total)
    assert found.keys() == {field for field, _ in model.named_parameters()}  # DDP waits for every parameter
    for parameter, gradient in found.items():
        assert not gradient.any() and gradient.isfinite().all(), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_a_micro_batch_without_utterances_does_not_change_the_one_it_is_joined_with(name: str) -> None:
    objective = family(name)
    model = build(objective).train()
    full, empty = batch(objective, 2000, 2600), batch(objective)
    alone = sums_of(objective, model, full)
    joined = sums_of(objective, model, full, empty, numbers=(0, 1))
    assert_close_sums(joined, alone)
    assert_close_gradients(gradients(model, joined.total), gradients(model, alone.total))
