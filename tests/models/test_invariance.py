"""What must not change the result: padding, company in a batch, joined forwards, precision; and what must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from w2vscale.objectives.criterion import PretrainingCriterion, active_layers

from w2vscale.config import Config, ModelConfig, load_config
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise, make_inputs
from w2vscale.models.feature_encoder import GroupNorm, WaveformLayer, output_frames
from w2vscale.models.layers import LayerNorm, compute_dtype
from w2vscale.models.transformer import PositionalConvolution
from w2vscale.models.wav2vec2 import EncoderOutput, LossSums, Wav2Vec2ForPretraining
from w2vscale.objectives.contrastive import contrastive_logits, contrastive_loss
from w2vscale.objectives.quantizer import Quantizer, diversity_loss, perplexity

CPU = torch.device("cpu")
SMALL = (
    "model.conv_layers=[[32,10,5],[32,3,2],[32,3,2],[32,2,2]]",
    "model.conv_norm_groups=32",
    "model.layers=3",
    "model.dim=48",
    "model.ffn_dim=64",
    "model.heads=4",
    "model.positional_kernel=16",
    "model.positional_groups=4",
    "regularization.dropout=0",
    "regularization.attention_dropout=0",
    "regularization.input_dropout=0",
    "objective.feature_dropout=0",
    "regularization.layerdrop=0",
    "objective.codebook_entries=20",
    "objective.codevector_dim=24",
    "objective.projection_dim=24",
    "objective.negatives=20",
)
FAMILIES = {
    "base": ("base", SMALL),
    "large_lv60": ("large_lv60", SMALL),
    "base_prenorm": ("base_prenorm", (*SMALL, "model.conv_norm_groups=8")),
    # A layer without padding before one with padding.
    "padded, even kernels": (
        "base_prenorm",
        (*SMALL, "model.conv_layers=[[32,10,5],[32,2,2],[32,3,2],[32,2,1],[32,5,2]]"),
    ),
}


def family(name: str, *overrides: str) -> ModelConfig:
    preset, settings = FAMILIES[name]
    return load_config(preset, (*settings, *overrides)).model


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Wav2Vec2ForPretraining:
    torch.manual_seed(1)
    model = Wav2Vec2ForPretraining(config, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no bias zero, no scale one
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def noise(*samples: int, seed: int = 0) -> list[NDArray[np.float32]]:
    draws = np.random.default_rng(seed)
    return [draws.standard_normal(size, dtype=np.float32) for size in samples]


def batch(config: ModelConfig, *samples: int, number: int = 0) -> MicroBatch:
    waveforms = noise(*samples, seed=number)
    inputs = make_inputs(waveforms, range(len(samples)), number=number, seed=5, config=config)
    return MicroBatch(update=0, number=number, inputs=inputs, audio_samples=sum(samples))


def gradients(model: Wav2Vec2ForPretraining, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def assert_close_sums(actual: LossSums, expected: LossSums) -> None:
    for name, left, right in zip(LossSums._fields, actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


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
        (together.targets_BTC, alone.targets_BTC),
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


# ---------------------------------------------------------------- joined forwards


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_joined_micro_batches_have_the_losses_and_gradients_of_separate_forwards(name: str, training: bool) -> None:
    config = family(name, "objective.feature_penalty_weight=3")
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
    config = family(name, "objective.feature_penalty_weight=3")
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


# ---------------------------------------------------------------- LayerDrop and the gradient scale


@pytest.mark.parametrize("name", ["base", "large_lv60"])
def test_a_dropped_layer_is_the_identity_and_gets_no_gradient(name: str) -> None:
    config = family(name)
    model = build(config).train()
    encoded = []
    calls = [0] * config.layers
    model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    for index, block in enumerate(model.encoder.transformer.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    part = batch(config, 2000)
    sums = model(
        part.inputs,
        noise_MGV=gumbel_noise([part], seed=0, config=config, device=CPU),
        active=[True, False, True],
    )
    (output,) = encoded
    assert calls == [1, 0, 1]
    assert torch.equal(output.hidden[2], output.hidden[1])
    assert not torch.equal(output.hidden[1], output.hidden[0])
    assert not torch.equal(output.hidden[3], output.hidden[2])
    names = {name for name, _ in model.named_parameters()}
    assert names - gradients(model, sums.total).keys() == {name for name in names if ".blocks.1." in name}


def test_dropped_layers_are_a_function_of_seed_and_update() -> None:
    config = load_config("base", ["regularization.layerdrop=0.2"]).model
    drawn = [active_layers(update, config, seed=3) for update in range(500)]
    assert drawn == [active_layers(update, config, seed=3) for update in range(500)]
    assert drawn[0] is not None and len(drawn[0]) == config.layers
    assert drawn != [active_layers(update, config, seed=4) for update in range(500)]
    assert np.mean(drawn) == pytest.approx(0.8, abs=0.026)  # five standard deviations
    assert active_layers(0, load_config("base", ["regularization.layerdrop=0"]).model, seed=3) is None


def test_every_layer_runs_in_evaluation() -> None:
    config = family(
        "base", "regularization.layerdrop=0.99", "regularization.dropout=0.5", "regularization.input_dropout=0.5"
    )
    model = build(config).eval()
    criterion = PretrainingCriterion(config, seed=0)
    calls: list[int] = []
    for block in model.encoder.transformer.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    criterion(model, [batch(config, 2000)], device=CPU, training=False)
    assert len(calls) == config.layers


def test_the_gradient_into_the_feature_encoder_is_scaled_and_nothing_else() -> None:
    """That of the feature penalty included; the values stay."""
    found, losses = [], []
    for scale in (1.0, 0.1):
        config = family("base", f"regularization.feature_grad_mult={scale}", "objective.feature_penalty_weight=10")
        model = build(config).train()
        part = batch(config, 2000, 2400)
        sums = PretrainingCriterion(config, seed=4)(model, [part], device=CPU, training=True)
        found.append(gradients(model, sums.total))
        losses.append(sums.total.item())
    assert losses[0] == losses[1]
    whole, scaled = found
    for name, gradient in whole.items():
        factor = 0.1 if name.startswith("encoder.feature_encoder.") else 1.0
        torch.testing.assert_close(scaled[name], factor * gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_close_to_fp32(name: str) -> None:
    config = family(name)
    exact, rounded = build(config).train(), build(config, torch.bfloat16).train()
    criterion = PretrainingCriterion(config, seed=4)
    seen: list[EncoderOutput] = []
    for model in (exact, rounded):
        model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    part = batch(config, 4000, 6000, 5000)
    wanted, sums = (criterion(model, [part], device=CPU, training=True) for model in (exact, rounded))
    for field in ("total", "contrastive", "diversity", "feature_penalty"):
        assert getattr(sums, field).item() == pytest.approx(getattr(wanted, field).item(), rel=2e-2), field
    valid_BT = torch.arange(part.inputs.mask_BT.shape[1]) < part.inputs.frames_B.unsqueeze(1)
    expected, actual = (output.context_BTD.detach()[valid_BT].float() for output in seen)
    assert float((actual - expected).norm() / expected.norm()) < 2e-2
    assert seen[1].context_BTD.dtype == seen[1].targets_BTC.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_fp32_under_bf16(name: str) -> None:
    config = family(name)
    model = build(config, torch.bfloat16).train()
    quantized = []
    model.quantizer.register_forward_hook(lambda module, args, output: quantized.append(output))
    sums = PretrainingCriterion(config, seed=4)(model, [batch(config, 2000, 2600)], device=CPU, training=True)
    assert {value.dtype for value in sums} == {torch.float32}
    assert quantized[0].logits_MGV.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients(model, sums.total).values()} == {torch.float32}


def test_compute_dtype_follows_the_config() -> None:
    assert compute_dtype(Config().precision) == torch.bfloat16
    assert compute_dtype(load_config("base", ["precision.compute=fp32"]).precision) == torch.float32


def test_similarities_and_losses_of_bf16_vectors_are_computed_in_fp32() -> None:
    torch.manual_seed(0)
    context_MD, targets_MD = torch.randn(6, 32).bfloat16(), torch.randn(6, 32).bfloat16()

    def logits(context_MD: Tensor, targets_MD: Tensor) -> Tensor:
        return contrastive_logits(
            context_MD,
            targets_MD,
            torch.arange(6),
            utterance_M=torch.tensor([0, 0, 0, 1, 1, 1]),
            slot_M=torch.tensor([0, 1, 2, 0, 1, 2]),
            negatives_MK=torch.tensor([[1, 2], [0, 2], [0, 1]] * 2),
            utterances=2,
            slots=3,
            temperature=0.1,
        )

    assert torch.equal(logits(context_MD, targets_MD), logits(context_MD.float(), targets_MD.float()))
    expected = torch.cosine_similarity(context_MD[4].float(), targets_MD[5].float(), dim=0) / 0.1
    torch.testing.assert_close(logits(context_MD, targets_MD)[4, 2], expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_group_norm_is_that_of_the_convolution(padded: bool, groups: int, bias: bool) -> None:
    """Around a mean of 8 and of 30 samples in a second, values and gradients are PyTorch's."""
    torch.manual_seed(0)
    layers = "model.conv_layers=[[4,10,5],[4,2,2]]"
    config = load_config("base", [layers, f"model.conv_norm_groups={groups}", f"model.conv_bias={str(bias).lower()}"])
    layer = WaveformLayer(config.model)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    waveforms_BS = 8.0 + torch.randn(2, 3000)
    lengths_B = torch.tensor([3000, 2001]) if padded else None
    found_BTC, frames_B = layer(waveforms_BS, lengths_B)
    assert isinstance(layer.norm, GroupNorm)
    rows = []
    for waveform_S, length in zip(waveforms_BS, (3000, 2001) if padded else (3000, 3000), strict=True):
        x_1CT = F.conv1d(
            waveform_S[None, None, :length].double(),
            layer.weight.double(),
            layer.bias if layer.bias is None else layer.bias.double(),
            stride=5,
        )
        x_1CT = F.group_norm(x_1CT, groups, layer.norm.weight.double(), layer.norm.bias.double(), 1e-5)
        rows.append(F.gelu(x_1CT)[0].T)
    found = [row_TC[: len(expected)] for row_TC, expected in zip(found_BTC, rows, strict=True)]
    assert frames_B is None or frames_B.tolist() == [len(row_TC) for row_TC in rows]
    torch.testing.assert_close(torch.cat(found).double(), torch.cat(rows), rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(torch.cat(side).square().sum().float(), list(layer.parameters())) for side in (found, rows)
    ]
    # A mean of 8 costs three digits in fp32, and the order in which a processor adds up decides on the fourth.
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()) + 1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_group_norm_takes_its_statistics_in_fp64(padded: bool) -> None:
    """The mean of many bf16 numbers around 8 would be wrong by far more than the rounding of the result."""
    torch.manual_seed(0)
    layer = WaveformLayer(
        load_config("base", ["model.conv_layers=[[4,10,5],[4,2,2]]", "model.conv_norm_groups=4"]).model
    )
    waveforms_BS = (8.0 + torch.randn(2, 30_000)).bfloat16()
    lengths_B = torch.tensor([30_000, 20_000]) if padded else None
    x_BTC, _ = layer(waveforms_BS, lengths_B)
    assert x_BTC.dtype == torch.bfloat16
    for row, length in enumerate((30_000, 20_000) if padded else (30_000, 30_000)):
        y_1CT = F.conv1d(waveforms_BS[row, None, None, :length].double(), layer.weight.double(), stride=5)
        expected_TC = F.gelu(F.group_norm(y_1CT, 4)).squeeze(0).T
        error = (x_BTC[row, : len(expected_TC)].double() - expected_TC).square().mean().sqrt()
        assert float(error.detach()) < 0.05


def test_layer_norm_takes_its_statistics_in_fp32() -> None:
    torch.manual_seed(0)
    x_TC = (8.0 + torch.randn(5, 4096)).bfloat16()
    y_TC = LayerNorm(4096)(x_TC)
    assert y_TC.dtype == torch.bfloat16
    exact_TC = x_TC.double()
    variance = exact_TC.var(dim=1, keepdim=True, correction=0)
    expected = (exact_TC - exact_TC.mean(dim=1, keepdim=True)) / torch.sqrt(variance + 1e-5)
    torch.testing.assert_close(y_TC.double(), expected, rtol=2**-8, atol=1e-5)


def test_weight_norm_is_fp32_also_where_weights_are_kept_in_bf16() -> None:
    """An impulse shows the weights: rounded once, not at every step of their norm."""
    config = family("base")
    torch.manual_seed(0)
    positional = PositionalConvolution(config).bfloat16()
    positional.magnitude.data.uniform_(0.5, 2.0)
    kernel = config.positional_kernel
    impulse_BTD = torch.zeros(1, kernel, config.dim, dtype=torch.bfloat16)
    impulse_BTD[0, kernel // 2, 0] = 1.0
    direction = positional.direction.double()
    weight = direction * positional.magnitude.double() / direction.norm(dim=(0, 1), keepdim=True)
    of_first_TD = weight[: config.dim // config.positional_groups, 0].flip(1).T
    expected_TD = torch.nn.functional.gelu(of_first_TD.bfloat16())[: kernel - 1]
    assert torch.equal(positional(impulse_BTD)[0, 1:, : expected_TD.shape[1]], expected_TD)


def test_gumbel_softmax_is_fp32_and_hard_under_bf16() -> None:
    config = family("base")
    torch.manual_seed(0)
    quantizer = Quantizer(config, 32)
    noise_MGV = -torch.empty(9, config.codebooks, config.codebook_entries).exponential_().log()
    result = quantizer(torch.randn(9, 32).bfloat16(), noise_MGV, temperature=0.5)
    assert result.logits_MGV.dtype == torch.float32
    assert result.vectors_MD.dtype == torch.bfloat16
    assert torch.equal(result.codes_MG, (result.logits_MGV + noise_MGV).argmax(dim=2))
    chosen = [quantizer.codevectors[group][result.codes_MG[:, group]] for group in range(config.codebooks)]
    assert torch.equal(result.vectors_MD, torch.cat(chosen, dim=1).bfloat16())


# ---------------------------------------------------------------- chance and collapse


def equal_similarities(ids_M: Tensor, negatives_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and correct frames of a model that cannot tell frames apart."""
    frames = ids_M.numel()
    same_MD = torch.ones(frames, 8)
    logits_MK = contrastive_logits(
        same_MD,
        same_MD,
        ids_M,
        utterance_M=torch.zeros(frames, dtype=torch.long),
        slot_M=torch.arange(frames),
        negatives_MK=negatives_MK,
        utterances=1,
        slots=frames,
        temperature=0.1,
    )
    return contrastive_loss(logits_MK)


def test_chance_is_log_101_nats() -> None:
    negatives_MK = (torch.arange(100) + 1 + torch.arange(150).unsqueeze(1)) % 150
    loss, _ = equal_similarities(torch.arange(150), negatives_MK)
    per_frame = loss.item() / 150
    assert per_frame == pytest.approx(math.log(101), rel=1e-6)
    assert per_frame == pytest.approx(4.615, abs=1e-3)
    assert per_frame / math.log(2) == pytest.approx(6.658, abs=1e-3)


def test_a_collapsed_codebook_has_no_negatives_no_loss_and_full_accuracy() -> None:
    negatives_MK = (torch.arange(100) + 1 + torch.arange(150).unsqueeze(1)) % 150
    loss, correct = equal_similarities(torch.zeros(150, dtype=torch.long), negatives_MK)
    assert loss.item() == 0.0
    assert int(correct) == 150


def test_the_diversity_loss_runs_from_0_to_638_of_640() -> None:
    uniform_GV = torch.full((2, 320), 1 / 320)
    one_code_GV = torch.nn.functional.one_hot(torch.tensor([3, 300]), 320).float()
    # fairseq's 1e-7 inside the logarithm makes 320 equal entries count as 320 (1 - 320e-7).
    assert diversity_loss(uniform_GV).item() == pytest.approx(0.0, abs=4e-5)
    assert diversity_loss(one_code_GV).item() == pytest.approx(638 / 640, rel=1e-6)
    half_GV = torch.cat([torch.full((2, 160), 1 / 160), torch.zeros(2, 160)], dim=1)
    assert diversity_loss(half_GV).item() == pytest.approx(0.5, abs=4e-5)
    assert perplexity(half_GV).tolist() == pytest.approx([160, 160], rel=4e-5)


def test_an_untrained_model_is_near_chance() -> None:
    config = family("base", "objective.negatives=100", "objective.codebook_entries=320", "objective.diversity_weight=0")
    model = build(config).eval()
    part = batch(config, 12_000, 12_000)
    sums = PretrainingCriterion(config, seed=0)(model, [part], device=CPU, training=False)
    assert float(sums.contrastive / sums.masked) == pytest.approx(math.log(101), rel=0.15)
    assert float(sums.correct / sums.masked) < 0.1


# ---------------------------------------------------------------- determinism


DROPOUT = (
    "regularization.dropout=0.1",
    "regularization.attention_dropout=0.1",
    "regularization.input_dropout=0.1",
    "objective.feature_dropout=0.1",
)


def test_dropout_is_a_function_of_seed_and_number() -> None:
    config = family("base", *DROPOUT, "regularization.activation_dropout=0.1")
    model = build(config).train()
    contexts: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
    part = batch(config, 2000, 2600, number=7)

    def run(seed: int, number: int, training: bool = True) -> tuple[float, Tensor]:
        torch.rand(3)  # whatever came before does not matter
        chunk = [replace(part, number=number)]
        sums = PretrainingCriterion(config, seed=seed)(model.train(training), chunk, device=CPU, training=training)
        return sums.total.item(), contexts.pop()

    loss, context = run(seed=1, number=7)
    again, same_context = run(seed=1, number=7)
    assert again == loss and torch.equal(same_context, context)
    for seed, number in ((1, 8), (2, 7)):
        other, other_context = run(seed, number)
        assert other != loss
        assert not torch.allclose(other_context, context)  # dropout: Gumbel noise does not reach the context
    plain, _ = run(seed=1, number=7, training=False)
    assert plain == run(seed=2, number=8, training=False)[0]


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout", "activation_dropout", "input_dropout"])
def test_every_dropout_of_the_context_has_an_effect_in_training_alone(setting: str) -> None:
    plain, config = family("base"), family("base", f"model.{setting}=0.3")
    part = batch(config, 2000)
    contexts: list[Tensor] = []
    for settings in (plain, config):
        model = build(settings)
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
        for training in (True, False):
            PretrainingCriterion(settings, seed=1)(model.train(training), [part], device=CPU, training=training)
    without, without_in_evaluation, dropped, in_evaluation = contexts
    assert_close(without, without_in_evaluation)
    assert torch.equal(in_evaluation, without_in_evaluation)
    assert not torch.allclose(dropped, without, rtol=1e-2, atol=1e-2)


def test_feature_dropout_reaches_the_quantizer_alone() -> None:
    plain, config = family("base"), family("base", "objective.feature_dropout=0.5")
    part = batch(config, 2000)
    contexts, logits = [], []
    for settings in (plain, config):
        model = build(settings).train()
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD))
        model.quantizer.register_forward_hook(lambda module, args, output: logits.append(output.logits_MGV))
        PretrainingCriterion(settings, seed=1)(model, [part], device=CPU, training=True)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2)


def test_the_longest_input_is_enforced() -> None:
    config = family("base_prenorm", "model.max_frames=40")
    model = build(config).eval()
    with pytest.raises(ValueError, match="the model takes at most 40"):
        encode(model, noise(4000))
