"""Dropout on CPUs is dropout, repeats with PyTorch's generator, and attention with it is PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from w2vscale.models.layers import dropout
from w2vscale.models.transformer import attention


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_a_share_is_dropped_and_the_rest_is_scaled(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(997, 1001, requires_grad=True)  # a number of elements that four does not divide
    y = dropout(x, probability, True)
    kept = y != 0
    share = 1.0 - float(kept.double().mean())
    assert share == pytest.approx(probability, abs=5 * (probability / x.numel()) ** 0.5)
    torch.testing.assert_close(y[kept], x[kept] / (1.0 - probability), rtol=1e-4, atol=0)
    # Neighbours in a row and in a column are dropped independently.
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        both = float((~one & ~other).double().mean())
        assert both == pytest.approx(probability**2, abs=5 * probability / x.numel() ** 0.5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1.0 - probability), rtol=1e-4, atol=0)


def test_it_repeats_with_the_seed_and_draws_anew_without() -> None:
    x = torch.ones(1000)
    torch.manual_seed(1)
    one, other = dropout(x, 0.3, True), dropout(x, 0.3, True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.3, True), one) and not torch.equal(one, other)


def test_without_training_or_probability_nothing_happens() -> None:
    x = torch.ones(3)
    assert dropout(x, 0.3, False) is x and dropout(x, 0.0, True) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_pytorchs(padded: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    attend = (torch.arange(7) < torch.tensor([[7], [4]])).view(2, 1, 1, 7) if padded else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
    found = attention(q, k, v, attend, 1e-6)  # too little to drop anything
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    given = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), given) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * tolerance, atol=4 * tolerance)
    dropped = torch.stack([attention(q, k, v, attend, 0.2) for _ in range(2000)]).float().mean(dim=0)
    torch.testing.assert_close(dropped, expected.float(), rtol=0.1, atol=0.15)
