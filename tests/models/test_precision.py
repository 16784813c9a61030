"""Models in bf16: close to fp32, with fp32 where bf16 would lose more than a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.comparison import error
from tests.helpers.families import (
    CPU,
    FAMILIES,
    batch,
    build,
    family,
    gradients,
)
from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import Config, load_config
from w2vscale.models.layers import LayerNorm, compute_dtype
from w2vscale.models.wav2vec2 import ConvLayer, EncoderOutput, PositionalConvolution, Wav2Vec2Encoder
from w2vscale.objectives.contrastive import contrastive_logits
from w2vscale.objectives.criterion import PretrainingCriterion
from w2vscale.objectives.quantizer import Quantizer


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
    assert seen[1].context_BTD.dtype == seen[1].normalised_BTC.dtype == torch.bfloat16


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
    # A mean of 8 costs three digits in fp32, and the order in which a processor adds up decides on the fourth.
    # What the norm takes away again, a bias of a group of its own, has a gradient of rounding errors.
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()) + 1e-6 * largest)


@pytest.mark.parametrize("padded", [False, True])
def test_group_norm_takes_its_statistics_in_fp32_or_better(padded: bool) -> None:
    """The mean of many bf16 numbers around 8 would be wrong by far more than the rounding of the result."""
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


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_under_autocast(preset: str) -> None:
    config = load_config(preset, list(MICRO_MODEL)).model
    torch.manual_seed(0)
    encoder = Wav2Vec2Encoder(config, config).eval()
    waveforms_BS = torch.randn(2, 8000)
    expected_BTD = encoder(waveforms_BS).context_BTD
    with torch.autocast("cpu", torch.bfloat16):
        found_BTD = encoder(waveforms_BS).context_BTD
    found_BTD.float().square().sum().backward()
    assert error(found_BTD, expected_BTD) < 0.05
