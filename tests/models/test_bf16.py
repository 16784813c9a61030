"""Where bf16 would lose more than a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.models import products
from w2vscale.models.feature_encoder import WaveformLayer
from w2vscale.models.layers import LayerNorm
from w2vscale.models.transformer import attention
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_layer_norms_gradients_are_sums_in_fp32(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    x_BTC, given_BTC = (0.5 + torch.randn(4, 2000, 64).bfloat16() for _ in range(2))
    found, exact = LayerNorm(64).to(weights), LayerNorm(64).double()
    leaves = [x_BTC.clone().requires_grad_(), x_BTC.double().requires_grad_()]
    found(leaves[0]).backward(given_BTC)
    F.layer_norm(leaves[1], (64,), exact.weight, exact.bias).backward(given_BTC.double())
    for one, other in ((found.weight, exact.weight), (found.bias, exact.bias), leaves):
        assert one.grad is not None and other.grad is not None
        assert error(one.grad, other.grad) < 2**-8


def test_attention_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are in fp32, scores and weights stay there."""
    monkeypatch.setattr(products, "CPU_HAS_BF16", False)
    torch.manual_seed(0)
    qkv = [(scale * torch.randn(1, 2, 100, 32)).bfloat16() for scale in (4.0, 4.0, 1.0)]
    given = torch.randn(1, 2, 100, 32).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        torch.manual_seed(1)  # the same dropout
        y_BHTE = attention(*leaves, None, 0.1)
        results.append([y_BHTE, *torch.autograd.grad(y_BHTE, leaves, given.to(dtype))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.bfloat16 and error(one, other) < 2**-8


def test_an_utterance_without_a_frame_to_attend_to_gives_numbers() -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    attend = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 5)
    assert attention(*qkv, attend, 0.1).isfinite().all()


@pytest.mark.parametrize("kernel", [10, 6, 7])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_an_offset_of_the_waveform_leaves_nothing_behind(offset: float, kernel: int) -> None:
    """GroupNorm takes the mean away; that of weights which were rounded afterwards would be another."""
    settings = (f"model.conv_layers=[[64,{kernel},5],[64,2,2]]", "model.conv_norm_groups=64")
    layer = WaveformLayer(load_config("base", settings).model)
    torch.manual_seed(0)
    waveforms_BS = (offset + 0.1 * torch.randn(2, 4000)).bfloat16()
    with torch.no_grad():
        found_BTC, _ = layer(waveforms_BS, None)
    y_BCT = F.conv1d(waveforms_BS.double().unsqueeze(1), layer.weight.double(), stride=5)
    expected_BTC = F.gelu(F.group_norm(y_BCT, 64)).transpose(1, 2).detach()
    assert error(found_BTC, expected_BTC) < 2**-7
    assert float((found_BTC.double() - expected_BTC).mean(dim=1).abs().max()) < 3e-3


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_under_autocast(preset: str) -> None:
    config = load_config(preset, list(MICRO_MODEL)).model
    torch.manual_seed(0)
    encoder = Wav2Vec2Encoder(config).eval()
    waveforms_BS = torch.randn(2, 8000)
    expected_BTD = encoder(waveforms_BS).context_BTD
    with torch.autocast("cpu", torch.bfloat16):
        found_BTD = encoder(waveforms_BS).context_BTD
    found_BTD.float().square().sum().backward()
    assert error(found_BTD, expected_BTD) < 0.05
