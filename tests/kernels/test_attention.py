"""Attention with dropout on CPUs, and within packed utterances on GPUs, against PyTorch attention with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from tests.helpers.micro import MICRO_ENCODER
from w2vscale.config import load_config
from w2vscale.kernels import packed_attention as packed_attention_module
from w2vscale.kernels.cpu_attention import attention_with_cpu_dropout
from w2vscale.kernels.packed_attention import has_flash_attention, packed_attention, takes_packed
from w2vscale.kernels.packing import Lengths, Packing
from w2vscale.models.wav2vec2 import TransformerEncoder, attention, valid_mask

plain = attention.__wrapped__
TOO_LITTLE = 1e-6
"""A dropout probability that drops nothing in 16 bits."""


def packing_of(*frames: int, steps: int | None = None, device: str = "cpu") -> Packing:
    frames_B = torch.tensor(frames, device=device)
    x_BTD = torch.empty(len(frames), steps or max(frames), 0, device=device)
    return Packing.of(x_BTD, Lengths(frames_B, frames_B, sum(frames)))


def tensors(packing: Packing, heads: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(int(packing.bounds[-1]), heads, size).to(dtype) for _ in range(3)]


def masked(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing) -> Tensor:
    """PyTorch attention over padded utterances, with a mask of their valid frames; packed again."""
    frames_B = packing.bounds.diff()
    valid_BT = valid_mask(frames_B, packing.steps)
    q_BHTE, k_BHTE, v_BHTE = (
        torch.stack(
            [
                F.pad(one_THE, (0, 0, 0, 0, 0, packing.steps - len(one_THE)))
                for one_THE in x_NHE.split(frames_B.tolist())
            ]
        ).transpose(1, 2)
        for x_NHE in (q_NHE, k_NHE, v_NHE)
    )
    y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=valid_BT[:, None, None])
    return y_BHTE.transpose(1, 2)[valid_BT]


@pytest.mark.parametrize("packing", [packing_of(9, 5, 1), packing_of(4, 3, steps=6), packing_of(7, 7)])
def test_the_plain_one_is_attention_with_a_mask(packing: Packing) -> None:
    leaves = tensors(packing, dtype=torch.float64)
    expected = outputs_and_gradients(partial(masked, packing=packing), leaves)
    assert_same(outputs_and_gradients(lambda *qkv: plain(*qkv, packing, 0.0), leaves), expected, 1e-12)


# ---------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("frames", [1, 7, 33])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_on_a_cpu_it_is_the_plain_one(dtype: torch.dtype, tolerance: float, padded: bool, frames: int) -> None:
    packing = packing_of(frames, frames // 2 + 1 if padded else frames)
    leaves = tensors(packing, dtype=dtype)
    expected = outputs_and_gradients(lambda *qkv: plain(*qkv, packing, 0.0), leaves)
    found = outputs_and_gradients(lambda *qkv: attention_with_cpu_dropout(*qkv, packing, TOO_LITTLE), leaves)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert float((one - other).double().norm()) <= tolerance * max(float(other.double().norm()), 1.0)


@pytest.mark.parametrize("packing", [packing_of(7, 7), packing_of(7, 4)])
def test_dropout_keeps_the_mean(packing: Packing) -> None:
    leaves = tensors(packing)
    expected = plain(*leaves, packing, 0.0)
    for form in (attention_with_cpu_dropout, plain):
        mean = torch.stack([form(*leaves, packing, 0.2) for _ in range(2000)]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("form", [attention_with_cpu_dropout, plain])
def test_dropout_drops_its_share_of_the_weights(form: Callable[..., Tensor]) -> None:
    check_dropout(form, packing_of(200, 256))


def check_dropout(form: Callable[..., Tensor], packing: Packing, dtype: torch.dtype = torch.float32) -> None:
    """Assert that a tenth of all weights is dropped, independently, and that the others are scaled by 1 / 0.9."""
    torch.manual_seed(0)
    frames, steps, device = int(packing.bounds[-1]), packing.steps, packing.bounds.device
    zeros_NHE = torch.zeros(frames, 4, steps, device=device, dtype=dtype)
    first, second = packing.bounds.diff().tolist()
    # Where frame j of an utterance has the j-th unit vector, each output is a row of weights, here uniform.
    v_NE = torch.cat([torch.eye(steps, device=device, dtype=dtype)[:count] for count in (first, second)])
    y_NHE = form(zeros_NHE, zeros_NHE, v_NE.unsqueeze(1).expand(-1, 4, -1), packing, 0.1).float()
    for start, count in ((0, first), (first, second)):
        weights_NHE = y_NHE[start : start + count, :, :count] * count
        dropped_NHE = (weights_NHE == 0).float()
        assert float(dropped_NHE.mean()) == pytest.approx(0.1, abs=0.01)
        assert float(weights_NHE.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(weights_NHE.max()) == pytest.approx(1 / 0.9, rel=0.01)
        # Neighbours in any direction are dropped together as often as by chance.
        for one, other in (
            (dropped_NHE[1:], dropped_NHE[:-1]),
            (dropped_NHE[:, 1:], dropped_NHE[:, :-1]),
            (dropped_NHE[..., 1:], dropped_NHE[..., :-1]),
        ):
            assert float((one * other).mean()) == pytest.approx(0.01, abs=0.003)
        assert not y_NHE[start : start + count, :, count:].any()


def test_without_dropout_a_cpu_uses_pytorch() -> None:
    packing = packing_of(9, 9)
    leaves = tensors(packing)
    assert attention_with_cpu_dropout(*leaves, packing, 0.0) is NotImplemented
    of_batch = [x_NHE.view(2, 9, 3, 8).transpose(1, 2) for x_NHE in leaves]
    expected_BHTE = F.scaled_dot_product_attention(*of_batch)
    assert_same([attention(*leaves, packing, 0.0)], [expected_BHTE.transpose(1, 2).flatten(0, 1)])


# ---------------------------------------------------------------- FlashAttention


@pytest.fixture
def flash_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's operation of FlashAttention on packed sequences, computed here by the formulas of attention."""

    def forward(
        q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, of_q: Tensor, of_k: Tensor, most_q: int, most_k: int,
        dropout: float, causal: bool, debug: bool, **_: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert of_q is of_k and of_q.dtype == torch.int32 and most_q == most_k >= int(of_q.diff().max())
        assert dropout == 0.0 and not causal and not debug
        parts = zip(*(x_NHE.split(of_q.diff().tolist()) for x_NHE in (q_NHE, k_NHE, v_NHE)), strict=True)
        y_NHE = torch.cat([torch.einsum("hts,she->the", weights(q, k), v) for q, k, v in parts])
        return y_NHE, *(torch.empty(0) for _ in range(4))

    def backward(
        gradient_NHE: Tensor, q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, y_NHE: Tensor, logsumexp: Tensor,
        of_q: Tensor, *others: object, **_: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found = []
        given = (x_NHE.split(of_q.diff().tolist()) for x_NHE in (gradient_NHE, q_NHE, k_NHE, v_NHE))
        for gradient_THE, q_THE, k_THE, v_THE in zip(*given, strict=True):
            p_HTS = weights(q_THE, k_THE)
            of_p_HTS = torch.einsum("the,she->hts", gradient_THE, v_THE)
            of_scores_HTS = p_HTS * (of_p_HTS - (of_p_HTS * p_HTS).sum(dim=2, keepdim=True)) * q_THE.shape[2] ** -0.5
            found.append(
                (
                    torch.einsum("hts,she->the", of_scores_HTS, k_THE),
                    torch.einsum("hts,the->she", of_scores_HTS, q_THE),
                    torch.einsum("hts,the->she", p_HTS, gradient_THE),
                )
            )
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def weights(q_THE: Tensor, k_THE: Tensor) -> Tensor:
        return (torch.einsum("the,she->hts", q_THE, k_THE) * q_THE.shape[2] ** -0.5).softmax(dim=2)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(packed_attention_module, "takes_packed", lambda q_NHE: True)
    yield
    library._destroy()


@pytest.mark.parametrize("packing", [packing_of(9, 5, 1), packing_of(4, 3, steps=6), packing_of(7, 7)])
@pytest.mark.usefixtures("flash_on_a_cpu")
def test_packed_attention_is_attention_with_a_mask(packing: Packing) -> None:
    leaves = tensors(packing, dtype=torch.float64)
    expected = outputs_and_gradients(partial(masked, packing=packing), leaves)
    assert_same(outputs_and_gradients(lambda *qkv: packed_attention(*qkv, packing, 0.0), leaves), expected, 1e-12)


def test_a_cpu_has_no_flash_attention() -> None:
    packing = packing_of(5, 4)
    leaves = tensors(packing, size=16, dtype=torch.bfloat16)
    assert not takes_packed(leaves[0])
    assert packed_attention(*leaves, packing, 0.0) is NotImplemented


@pytest.mark.cuda
class TestOnAGpu:
    @pytest.mark.parametrize("size", [64, 80, 120])
    def test_values_and_gradients_are_those_of_a_mask(self, size: int) -> None:
        frames = (300, 333, 17, 332)
        packing, on_gpu = packing_of(*frames), packing_of(*frames, device="cuda")
        leaves = tensors(packing, size=size)
        expected = outputs_and_gradients(partial(masked, packing=packing), [x.double() for x in leaves])
        found = outputs_and_gradients(
            lambda *qkv: packed_attention(*qkv, on_gpu, 0.0), [x.to("cuda", torch.bfloat16) for x in leaves]
        )
        for one, other in zip(found, expected, strict=True):
            assert error(one, other) < 2**-6

    def test_dropout_drops_its_share_of_the_weights(self) -> None:
        check_dropout(packed_attention, packing_of(200, 256, device="cuda"), torch.bfloat16)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_encoder_in_bf16_gives_what_it_gives_in_fp32(self, compiled: bool) -> None:
        config = load_config("base", [*MICRO_ENCODER, "model.dim=64"])
        torch.manual_seed(0)
        encoder = TransformerEncoder(config.model, config.regularization).to("cuda").eval()
        x_BTD = torch.randn(3, 50, 64, device="cuda")
        frames_B = torch.tensor([50, 20, 49], device="cuda")
        lengths = Lengths(frames_B, frames_B, 119)
        expected_BTD, *_ = encoder(x_BTD, lengths)
        if compiled:
            torch.compiler.assume_constant_result(has_flash_attention)
            for block in encoder.blocks:
                block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)
        found_BTD, *_ = encoder(x_BTD.bfloat16().requires_grad_(), lengths)
        found_BTD.float().square().sum().backward()
        assert error(found_BTD, expected_BTD) < 0.03
        assert all(x.grad is not None and x.grad.isfinite().all() for x in encoder.parameters())
