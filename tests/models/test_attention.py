"""Attention that never meets padding: by a mask, and within segments as GPUs compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.models.feature_encoder import valid_mask
from w2vscale.models.transformer import (
    TransformerEncoder,
    attention,
    attention_in_segments,
    segment_bounds,
    takes_segments,
)


def masked_attention(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, frames_B: Tensor) -> Tensor:
    mask = valid_mask(frames_B, q_BTHE.shape[1]).view(len(frames_B), 1, 1, -1)
    q_BHTE, k_BHTE, v_BHTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, v_BTHE))
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, mask).transpose(1, 2)


def test_segments_are_utterances_and_the_padding_behind_them() -> None:
    bounds = segment_bounds(torch.tensor([3, 5, 1]), 5)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 5, 10, 10, 11, 15]


def test_in_segments_valid_frames_get_what_a_mask_gives_them() -> None:
    torch.manual_seed(0)
    frames_B, steps = torch.tensor([7, 11, 4]), 11
    qkv = [torch.randn(3, steps, 2, 8, dtype=torch.float64) for _ in range(3)]
    bounds = segment_bounds(frames_B, steps)
    segment_N = torch.bucketize(torch.arange(3 * steps), bounds[1:].long(), right=True)
    same_NN = segment_N.unsqueeze(1) == segment_N
    q_HNE, k_HNE, v_HNE = (x.flatten(0, 1).transpose(0, 1) for x in qkv)
    found_BTHE = F.scaled_dot_product_attention(q_HNE, k_HNE, v_HNE, same_NN).transpose(0, 1).view_as(qkv[0])
    valid_BT = valid_mask(frames_B, steps)
    expected_BTHE = masked_attention(*qkv, frames_B)
    torch.testing.assert_close(found_BTHE[valid_BT], expected_BTHE[valid_BT], rtol=1e-12, atol=1e-12)


def test_a_cpu_takes_a_mask() -> None:
    assert not takes_segments(torch.zeros(1, 5, 64, dtype=torch.bfloat16), heads=4)


@pytest.mark.cuda
class TestOnAGpu:
    @pytest.mark.parametrize("size", [64, 80, 120])
    def test_values_and_gradients_are_those_of_a_mask(self, size: int) -> None:
        torch.manual_seed(0)
        frames_B, steps = torch.tensor([300, 333, 17, 332]), 333
        exact = [torch.randn(4, steps, 3, size, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        valid_BT11 = valid_mask(frames_B, steps).view(4, steps, 1, 1)
        given_BTHE = torch.randn(4, steps, 3, size, dtype=torch.float64) * valid_BT11
        expected_BTHE = masked_attention(*exact, frames_B)
        expected = [expected_BTHE * valid_BT11, *torch.autograd.grad(expected_BTHE, exact, given_BTHE)]
        leaves = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
        bounds = segment_bounds(frames_B.to("cuda"), steps)
        found_BTHE = attention_in_segments(leaves[0], leaves[1], leaves[2], bounds, 0.0)
        found = [found_BTHE, *torch.autograd.grad(found_BTHE, leaves, given_BTHE.to("cuda", torch.bfloat16))]
        for one, other in zip(found, expected, strict=True):
            valid = one.cpu().double() * valid_BT11
            assert float((valid - other).norm() / other.norm()) < 2**-6

    def test_dropout_drops_its_share_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        frames_B, steps = torch.tensor([200, 256], device="cuda"), 256
        q_BTHE, k_BTHE = (torch.zeros(2, steps, 4, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        # Each output is the row of dropped weights, times the number of frames.
        v_BTHE = torch.eye(steps, device="cuda", dtype=torch.bfloat16).view(1, steps, 1, steps).repeat(2, 1, 4, 1)
        y_BTHE = attention_in_segments(q_BTHE, k_BTHE, v_BTHE, segment_bounds(frames_B, steps), 0.1)
        weights_THE = y_BTHE[1].float() * steps
        assert float((weights_THE == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
        assert float(weights_THE.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(weights_THE.max()) == pytest.approx(1 / 0.9, rel=0.01)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_encoder_in_bf16_gives_what_it_gives_in_fp32(self, compiled: bool) -> None:
        config = load_config("base", [*MICRO_MODEL, "model.dim=64"]).model
        torch.manual_seed(0)
        encoder = TransformerEncoder(config).to("cuda").eval()
        x_BTD = torch.randn(3, 50, 64, device="cuda")
        frames_B = torch.tensor([50, 20, 49], device="cuda")
        expected_BTD, _ = encoder(x_BTD, frames_B)
        assert takes_segments(x_BTD.bfloat16(), config.heads) and not takes_segments(x_BTD, config.heads)
        if compiled:
            for block in encoder.blocks:
                block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)
        found_BTD, _ = encoder(x_BTD.bfloat16().requires_grad_(), frames_B)
        found_BTD.float().square().sum().backward()
        valid_BT = valid_mask(frames_B, 50)
        difference = (found_BTD[valid_BT].float() - expected_BTD[valid_BT]).norm() / expected_BTD[valid_BT].norm()
        assert float(difference) < 0.03
        assert all(x.grad is not None and x.grad.isfinite().all() for x in encoder.parameters())


def test_without_dropout_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    q_BHTE, k_BHTE, v_BHTE = (torch.randn(2, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    expected_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)
    torch.testing.assert_close(attention(q_BHTE, k_BHTE, v_BHTE, None, 0.0), expected_BHTE)
