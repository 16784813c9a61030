"""Attention with dropout on CPUs, and within segments on GPUs, against PyTorch attention with a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from tests.helpers.micro import MICRO_ENCODER
from w2vscale.config import load_config
from w2vscale.kernels.cpu_attention import attention_with_cpu_dropout
from w2vscale.kernels.segment_attention import segment_attention, segment_bounds, takes_segments
from w2vscale.models.wav2vec2 import TransformerEncoder, attention, valid_mask

plain = attention.__wrapped__
TOO_LITTLE = 1e-6
"""A dropout probability that drops nothing in 16 bits."""


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for _ in range(3)]


# ---------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("frames", [1, 7, 33])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_on_a_cpu_it_is_the_plain_one(dtype: torch.dtype, tolerance: float, padded: bool, frames: int) -> None:
    leaves = tensors(2, 3, frames, 8, dtype=dtype)
    valid_BT = valid_mask(torch.tensor([frames, frames // 2 + 1]), frames) if padded else None
    expected = outputs_and_gradients(lambda *qkv: plain(*qkv, valid_BT, 0.0), leaves)
    found = outputs_and_gradients(lambda *qkv: attention_with_cpu_dropout(*qkv, valid_BT, TOO_LITTLE), leaves)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert float((one - other).double().norm()) <= tolerance * max(float(other.double().norm()), 1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_dropout_keeps_the_mean(padded: bool) -> None:
    leaves = tensors(2, 3, 7, 8)
    valid_BT = valid_mask(torch.tensor([7, 4]), 7) if padded else None
    expected = plain(*leaves, valid_BT, 0.0)
    for form in (attention_with_cpu_dropout, plain):
        mean = torch.stack([form(*leaves, valid_BT, 0.2) for _ in range(2000)]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.15)


def test_without_dropout_a_cpu_uses_pytorch() -> None:
    leaves = tensors(2, 2, 9, 8)
    assert attention_with_cpu_dropout(*leaves, None, 0.0) is NotImplemented
    assert_same([attention(*leaves, None, 0.0)], [F.scaled_dot_product_attention(*leaves)])


def test_an_utterance_without_a_frame_to_attend_to_gives_numbers() -> None:
    valid_BT = torch.tensor([[True], [False]]).expand(2, 5)
    assert attention_with_cpu_dropout(*tensors(2, 2, 5, 8), valid_BT, 0.1).isfinite().all()


# ---------------------------------------------------------------- in segments


def test_segments_are_utterances_and_the_padding_behind_them() -> None:
    bounds = segment_bounds(valid_mask(torch.tensor([3, 5, 1]), 5))
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 5, 10, 10, 11, 15]


def test_in_segments_valid_frames_get_what_a_mask_gives_them() -> None:
    valid_BT = valid_mask(torch.tensor([7, 11, 4]), 11)
    leaves = tensors(3, 2, 11, 8, dtype=torch.float64)
    segment_N = torch.bucketize(torch.arange(valid_BT.numel()), segment_bounds(valid_BT)[1:].long(), right=True)
    same_NN = segment_N.unsqueeze(1) == segment_N
    qkv_HNE = [x_BHTE.transpose(0, 1).flatten(1, 2) for x_BHTE in leaves]
    found_BHTE = F.scaled_dot_product_attention(*qkv_HNE, same_NN).unflatten(1, (3, 11)).transpose(0, 1)
    valid_B1T1 = valid_BT[:, None, :, None]
    assert_same([found_BHTE * valid_B1T1], [plain(*leaves, valid_BT, 0.0) * valid_B1T1], 1e-12)


def test_a_cpu_takes_a_mask() -> None:
    leaves = tensors(1, 4, 5, 16, dtype=torch.bfloat16)
    assert not takes_segments(leaves[0])
    assert segment_attention(*leaves, torch.ones(1, 5, dtype=torch.bool), 0.0) is NotImplemented


@pytest.mark.cuda
class TestOnAGpu:
    @pytest.mark.parametrize("size", [64, 80, 120])
    def test_values_and_gradients_are_those_of_a_mask(self, size: int) -> None:
        valid_BT = valid_mask(torch.tensor([300, 333, 17, 332]), 333)
        leaves = tensors(4, 3, 333, size)

        def of_valid_frames(form: Callable[..., Tensor], valid_BT: Tensor, *qkv: Tensor) -> Tensor:
            return form(*qkv, valid_BT, 0.0) * valid_BT[:, None, :, None]

        expected = outputs_and_gradients(partial(of_valid_frames, plain, valid_BT), [x.double() for x in leaves])
        found = outputs_and_gradients(
            partial(of_valid_frames, segment_attention, valid_BT.to("cuda")),
            [x.to("cuda", torch.bfloat16) for x in leaves],
        )
        for one, other in zip(found, expected, strict=True):
            assert error(one, other) < 2**-6

    def test_dropout_drops_its_share_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        steps = 256
        valid_BT = valid_mask(torch.tensor([200, 256], device="cuda"), steps)
        q_BHTE, k_BHTE = (torch.zeros(2, 4, steps, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        # Each output is the row of dropped weights, times the number of frames.
        v_BHTE = torch.eye(steps, device="cuda", dtype=torch.bfloat16).expand(2, 4, -1, -1)
        weights_HTE = segment_attention(q_BHTE, k_BHTE, v_BHTE, valid_BT, 0.1)[1].float() * steps
        assert float((weights_HTE == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
        assert float(weights_HTE.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(weights_HTE.max()) == pytest.approx(1 / 0.9, rel=0.01)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_encoder_in_bf16_gives_what_it_gives_in_fp32(self, compiled: bool) -> None:
        config = load_config("base", [*MICRO_ENCODER, "model.dim=64"])
        torch.manual_seed(0)
        encoder = TransformerEncoder(config.model, config.regularization).to("cuda").eval()
        x_BTD = torch.randn(3, 50, 64, device="cuda")
        frames_B = torch.tensor([50, 20, 49], device="cuda")
        expected_BTD, _ = encoder(x_BTD, frames_B)
        if compiled:
            for block in encoder.blocks:
                block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)
        found_BTD, _ = encoder(x_BTD.bfloat16().requires_grad_(), frames_B)
        found_BTD.float().square().sum().backward()
        valid_BT = valid_mask(frames_B, 50)
        assert error(found_BTD[valid_BT], expected_BTD[valid_BT]) < 0.03
        assert all(x.grad is not None and x.grad.isfinite().all() for x in encoder.parameters())
