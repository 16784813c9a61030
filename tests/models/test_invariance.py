"""What must not change the result: padding, other utterances in a batch, joined forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.families import (
    CPU,
    FAMILIES,
    assert_close,
    assert_close_sums,
    batch,
    build,
    family,
    gradients,
    noise,
)
from w2vscale.config import ModelConfig
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise, make_inputs
from w2vscale.models.lengths import output_frames
from w2vscale.models.wav2vec2 import EncoderOutput
from w2vscale.objectives.contrastive_model import LossSums, Wav2Vec2ForPretraining
from w2vscale.objectives.criterion import PretrainingCriterion
from w2vscale.objectives.quantizer import diversity_loss

# ---------------------------------------------------------------- padding


@torch.no_grad()
def encode(model: Wav2Vec2ForPretraining, waveforms: Sequence[NDArray[np.float32]]) -> tuple[EncoderOutput, list[int]]:
    """What the encoder makes of a batch, and the frames of each utterance."""
    lengths = [waveform.size for waveform in waveforms]
    frames = [output_frames(length, model.config) for length in lengths]
    padded = torch.zeros(len(waveforms), max(lengths))
    for row, waveform in enumerate(waveforms):
        padded[row, : waveform.size] = torch.from_numpy(waveform)
    if len(set(lengths)) == 1:
        return model.encoder(padded), frames
    return model.encoder(padded, torch.tensor(lengths), torch.tensor(frames)), frames


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
    """Of the contrastive loss, which utterances add up to; the codes are their own."""
    config = family(name)
    model = build(config).eval()
    waveforms = noise(2000, 3100, 2600)
    together = model(make_inputs(waveforms, range(3), number=0, seed=1, config=config))
    alone = [
        model(make_inputs([waveform], [place], number=0, seed=1, config=config))
        for place, waveform in enumerate(waveforms)
    ]
    assert together.contrastive > 1.0
    torch.testing.assert_close(together.contrastive, sum(sums.contrastive for sums in alone), rtol=1e-5, atol=0)
    assert torch.equal(together.code_counts_GV, sum(sums.code_counts_GV for sums in alone))


def test_the_longest_input_is_enforced() -> None:
    config = family("base_prenorm", "model.max_frames=40")
    model = build(config).eval()
    with pytest.raises(ValueError, match="the model takes at most 40"):
        encode(model, noise(4000))


@pytest.mark.parametrize("name", ["base", "base_prenorm"])
@pytest.mark.parametrize("sizes", [(400,), (3, 4, 1, 900, 92), (700, 6, 294)])
def test_group_norm_s_statistics_may_be_taken_in_blocks(name: str, sizes: tuple[int, ...]) -> None:
    """Those of a whole waveform, of which parts can then be encoded."""
    encoder = build(family(name)).encoder.feature_encoder
    waveform_S = 0.5 + torch.from_numpy(noise(sum(sizes))[0])
    whole_1TC = encoder(waveform_S.unsqueeze(0), None)
    statistics = encoder.statistics(waveform_S.split(sizes))
    assert_close(encoder(waveform_S.unsqueeze(0), None, statistics), whole_1TC)


# ---------------------------------------------------------------- joined forwards


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_joined_micro_batches_have_the_losses_and_gradients_of_separate_forwards(name: str, training: bool) -> None:
    config = family(name, "model.feature_penalty_weight=3")
    model = build(config).train(training)
    criterion = PretrainingCriterion(config, seed=4)
    # Different widths; one padded, one not; numbers out of order.
    chunk = [batch(config, 2000, 2600, number=7), batch(config, 3001, 3001, number=2), batch(config, 1900, number=9)]
    joined = criterion(model, chunk, device=CPU, training=training)
    separate = [criterion(model, [part], device=CPU, training=training) for part in chunk]
    summed = separate[0].plus(separate[1]).plus(separate[2])
    assert_close_sums(joined, summed)
    of_joined, of_summed = gradients(model, joined.total), gradients(model, summed.total)
    assert of_joined.keys() == of_summed.keys()
    for parameter, gradient in of_summed.items():
        # Not of the largest value: gradients through a softmax may cancel to almost nothing.
        error = (of_joined[parameter] - gradient).norm()
        assert float(error) <= 1e-4 * max(float(gradient.norm()), 1e-3), parameter


@torch.no_grad()
def test_diversity_is_taken_per_micro_batch() -> None:
    """Not of the joined probabilities: two micro-batches that use different codes are each no more diverse for it."""
    config = family("base")
    model = build(config).eval()
    parts = [batch(config, 2000, number=number) for number in (0, 1)]
    quantized = []
    model.quantizer.register_forward_hook(lambda module, args, output: quantized.append(output))
    joined = PretrainingCriterion(config, seed=4)(model, parts, device=CPU, training=False)
    first_MGV, second_MGV = quantized[0].logits_MGV.softmax(dim=2).split([part.weight for part in parts])
    expected = sum(diversity_loss(part_MGV.mean(dim=0)) * part_MGV.shape[0] for part_MGV in (first_MGV, second_MGV))
    of_all = diversity_loss(torch.cat([first_MGV, second_MGV]).mean(dim=0)) * joined.masked
    torch.testing.assert_close(joined.diversity, expected)
    assert float((of_all - joined.diversity).abs()) > 1e-3 * float(joined.diversity)


def test_gumbel_noise_belongs_to_the_micro_batch() -> None:
    config = family("base")
    parts = [batch(config, 2000, 2600, number=7), batch(config, 3001, number=2)]
    joined_MGV = gumbel_noise(parts, seed=3, config=config, device=CPU)
    separate = [gumbel_noise([part], seed=3, config=config, device=CPU) for part in parts]
    assert torch.equal(joined_MGV, torch.cat(separate))
    assert joined_MGV.isfinite().all()
    assert joined_MGV.mean().item() == pytest.approx(0.5772, abs=0.05)  # Euler's constant
    assert joined_MGV.var().item() == pytest.approx(math.pi**2 / 6, abs=0.1)


# ---------------------------------------------------------------- an empty micro-batch


def silent(config: ModelConfig) -> MicroBatch:
    inputs = make_inputs([], [], number=1, seed=5, config=config)
    return MicroBatch(update=0, number=1, inputs=inputs, audio_samples=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_micro_batch_without_utterances_weighs_nothing(name: str, precision: torch.dtype) -> None:
    config = family(name, "model.feature_penalty_weight=3")
    model = build(config, precision).train()
    empty = silent(config)
    assert (empty.weight, empty.utterances, sum(empty.inputs.masked)) == (0, 0, 0)
    sums = PretrainingCriterion(config, seed=4)(model, [empty], device=CPU, training=True)
    for field, value in zip(LossSums._fields, sums, strict=True):
        assert not value.any() and value.isfinite().all(), field
    found = gradients(model, sums.total)
    assert found.keys() == {field for field, _ in model.named_parameters()}  # DDP waits for every parameter
    for parameter, gradient in found.items():
        assert not gradient.any() and gradient.isfinite().all(), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_a_micro_batch_without_utterances_does_not_change_the_one_it_is_joined_with(name: str) -> None:
    config = family(name)
    model = build(config).train()
    criterion = PretrainingCriterion(config, seed=4)
    full = batch(config, 2000, 2600)
    alone = criterion(model, [full], device=CPU, training=True)
    joined = criterion(model, [full, silent(config)], device=CPU, training=True)
    assert_close_sums(joined, alone)
    of_alone, of_joined = gradients(model, alone.total), gradients(model, joined.total)
    for parameter, gradient in of_alone.items():
        assert float((of_joined[parameter] - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), 1e-3), parameter
