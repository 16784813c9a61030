"""Dropout on CPUs has the distribution of PyTorch dropout, and is repeatable with its generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from w2vscale.kernels.sixteen_bit_dropout import sixteen_bit_dropout
from w2vscale.models.layers import dropout

FORMS = [sixteen_bit_dropout, dropout.__wrapped__]
"""The kernel passes the same tests as PyTorch dropout."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_a_share_is_dropped_and_the_rest_is_scaled(probability: float, form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.rand(997, 1001, requires_grad=True)  # four does not divide the number of elements
    y = form(x, probability, True)
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


@pytest.mark.parametrize("form", FORMS)
def test_it_repeats_with_the_seed_and_differs_without(form: Callable[..., Tensor]) -> None:
    x = torch.ones(1000)
    torch.manual_seed(1)
    one, other = form(x, 0.3, True), form(x, 0.3, True)
    torch.manual_seed(1)
    assert torch.equal(form(x, 0.3, True), one) and not torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_without_training_or_probability_nothing_happens(form: Callable[..., Tensor]) -> None:
    x = torch.rand(3)
    assert form(x, 0.3, False) is x
    assert torch.equal(form(x, 0.0, True), x)
