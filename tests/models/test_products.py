"""Matrix products in bf16 on processors with and without it: rounded products in fp32, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.models import products
from w2vscale.models.convolution import strided_convolution

BF16 = 2**-8
"""What rounding to bf16 changes at most, as a share."""


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value and gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))]


def compare(function: Callable[..., Tensor], expected: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    found = gradients(function, *inputs)
    exact = gradients(expected, *(x.double() for x in inputs))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        assert float((one.double() - other).detach().norm() / other.norm()) < BF16


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_HAS_BF16", request.param)


@pytest.mark.usefixtures("processor")
class TestInBf16:
    def test_linear(self) -> None:
        compare(products.linear, F.linear, (2, 3, 64), (32, 64), (32,))
        compare(products.linear, F.linear, (64,), (32, 64))
        assert products.linear(torch.ones(0, 64).bfloat16(), torch.ones(32, 64).bfloat16()).shape == (0, 32)

    def test_matmul(self) -> None:
        compare(products.matmul, torch.matmul, (2, 3, 5, 64), (2, 3, 64, 7))

    def test_strided_convolution(self) -> None:
        compare(
            lambda x, weight: strided_convolution(x, weight, 2),
            lambda x, weight: F.conv1d(x.transpose(1, 2), weight, stride=2).transpose(1, 2),
            (2, 21, 16),
            (8, 16, 3),
        )


def test_fp32_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert products.widened(x) is x
