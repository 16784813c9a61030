"""Models in bf16 are close to fp32, and use fp32 where bf16 would lose more than one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.comparison import error
from tests.helpers.families import FAMILIES, batch, build, family, gradients, sums_of, valid_frames
from tests.helpers.micro import MICRO_ENCODER
from w2vscale.config import Config, load_config
from w2vscale.models.layers import LayerNorm, Linear, compute_dtype, weights_cast_once
from w2vscale.models.wav2vec2 import ConvLayer, EncoderOutput, PositionalConvolution, Wav2Vec2Encoder
from w2vscale.objectives.quantizer import Quantizer
from w2vscale.objectives.similarity import contrastive_logits


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_close_to_fp32(name: str) -> None:
    seen: list[EncoderOutput] = []
    found = []
    for precision in ("fp32", "bf16"):
        objective = family(name, f"precision.compute={precision}")
        model = build(objective).train()
        model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
        inputs = batch(objective, 4000, 6000, 5000)
        found.append(sums_of(objective, model, inputs))
    wanted, sums = found
    for field in ("total", "contrastive", "diversity", "feature_penalty"):
        assert getattr(sums, field).item() == pytest.approx(getattr(wanted, field).item(), rel=2e-2), field
    expected, actual = (output.context_BTD.detach()[valid_frames(inputs)].float() for output in seen)
    assert float((actual - expected).norm() / expected.norm()) < 2e-2
    assert seen[1].context_BTD.dtype == seen[1].normalised_BTC.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_fp32_under_bf16(name: str) -> None:
    objective = family(name, "precision.compute=bf16")
    model = build(objective).train()
    quantized = []
    model.quantizer.register_forward_hook(lambda module, args, output: quantized.append(output))
    sums = sums_of(objective, model, batch(objective, 2000, 2600))
    assert {value.dtype for value in sums} == {torch.float32}
    assert quantized[0].logits_MGV.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients(model, sums.total).values()} == {torch.float32}


def test_compute_dtype_follows_the_config() -> None:
    assert compute_dtype(Config().precision) == torch.bfloat16
    assert compute_dtype(load_config("base", ["precision.compute=fp32"]).precision) == torch.float32


def test_weights_that_are_cast_once_give_the_same_gradients_also_if_they_are_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(4, 4), LayerNorm(4), Linear(4, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model[2].weight = model[0].weight
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with weights_cast_once(model, torch.bfloat16):
        found = torch.autograd.grad(model(x).float().sum(), [*model.parameters()])
    expected = torch.autograd.grad(model(x).float().sum(), [*model.parameters()])
    assert all(map(torch.equal, found, expected))
    assert not any(hasattr(parameter, "cast_copy") for parameter in model.parameters())


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
    """Values and gradients equal those of F.group_norm in float64, for waveforms with a mean of 8."""
    torch.manual_seed(0)
    layers = "model.conv_layers=[[4,10,5],[4,2,2]]"
    config = load_config("base", [layers, f"model.conv_norm_groups={groups}", f"model.conv_bias={str(bias).lower()}"])
    layer = ConvLayer(config.model, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    waveforms_BS = 8.0 + torch.randn(2, 3000)
    lengths_B = torch.tensor([3000, 2001]) if padded else None
    found_BTC, frames_B = layer(waveforms_BS.unsqueeze(2), lengths_B)
    assert isinstance(layer.norm, torch.nn.GroupNorm)
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
    # With a mean of 8, fp32 loses three digits, and a fourth depends on the order in which the processor adds.
    # The norm removes the bias of a group of one channel, so that its gradient is only rounding error.
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()) + 1e-6 * largest)


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_of_group_norm_are_computed_in_fp32_or_better(padded: bool) -> None:
    """In bf16, the mean of many numbers around 8 would be wrong by far more than the rounding of the result."""
    torch.manual_seed(0)
    settings = ("model.conv_layers=[[4,10,5],[4,2,2]]", "model.conv_norm_groups=4")
    layer = ConvLayer(load_config("base", settings).model, 0)
    waveforms_BS = (8.0 + torch.randn(2, 30_000)).bfloat16()
    lengths_B = torch.tensor([30_000, 20_000]) if padded else None
    x_BTC, _ = layer(waveforms_BS.unsqueeze(2), lengths_B)
    assert x_BTC.dtype == torch.bfloat16
    for row, length in enumerate((30_000, 20_000) if padded else (30_000, 30_000)):
        y_1CT = F.conv1d(waveforms_BS[row, None, None, :length].double(), layer.weight.double(), stride=5)
        expected_TC = F.gelu(F.group_norm(y_1CT, 4)).squeeze(0).T
        error = (x_BTC[row, : len(expected_TC)].double() - expected_TC).square().mean().sqrt()
        assert float(error.detach()) < 0.05


def test_statistics_of_layer_norm_are_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x_TC = (8.0 + torch.randn(5, 4096)).bfloat16()
    y_TC = LayerNorm(4096)(x_TC)
    assert y_TC.dtype == torch.bfloat16
    exact_TC = x_TC.double()
    variance = exact_TC.var(dim=1, keepdim=True, correction=0)
    expected = (exact_TC - exact_TC.mean(dim=1, keepdim=True)) / torch.sqrt(variance + 1e-5)
    torch.testing.assert_close(y_TC.double(), expected, rtol=2**-8, atol=1e-5)


def test_weight_norm_is_computed_in_fp32_for_bf16_weights() -> None:
    """The response to an impulse is the weights, which are rounded once and not at every step of their norm."""
    config = family("base").model
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
    torch.manual_seed(0)
    quantizer = Quantizer(32, codebooks=2, entries=20, dim=24)
    noise_MGV = -torch.empty(9, 2, 20).exponential_().log()
    result = quantizer(torch.randn(9, 32).bfloat16(), noise_MGV, temperature=0.5)
    assert result.logits_MGV.dtype == torch.float32
    assert result.vectors_MD.dtype == torch.bfloat16
    assert torch.equal(result.codes_MG, (result.logits_MGV + noise_MGV).argmax(dim=2))
    chosen = [quantizer.codevectors[group][result.codes_MG[:, group]] for group in range(2)]
    assert torch.equal(result.vectors_MD, torch.cat(chosen, dim=1).bfloat16())


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_under_autocast(preset: str) -> None:
    config = load_config(preset, MICRO_ENCODER)
    torch.manual_seed(0)
    encoder = Wav2Vec2Encoder(config.model, config.regularization).eval()
    waveforms_BS = torch.randn(2, 8000)
    expected_BTD = encoder(waveforms_BS).context_BTD
    with torch.autocast("cpu", torch.bfloat16):
        found_BTD = encoder(waveforms_BS).context_BTD
    found_BTD.float().square().sum().backward()
    assert error(found_BTD, expected_BTD) < 0.05
