"""Strided convolutions as matrix products against `F.conv1d`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from w2vscale.kernels.strided_products import strided_products
from w2vscale.models.wav2vec2 import strided_convolution

plain = strided_convolution.__wrapped__
SHAPES = [(3, 2), (2, 2), (10, 5), (8, 4), (4, 3), (5, 1), (2, 3), (1, 1)]
"""(kernel, stride)."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [5, 1])
@pytest.mark.parametrize("frames", [10, 11, 12, 37])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
def test_it_is_the_plain_one(kernel: int, stride: int, frames: int, inputs: int, bias: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        torch.manual_seed(0)
        leaves = [torch.randn(3, frames, inputs), torch.randn(4, inputs, kernel), torch.randn(4)][: 3 if bias else 2]
        leaves = [x.to(dtype) for x in leaves]
        found, expected = (
            outputs_and_gradients(lambda x, weight, bias=None: convolve(x, weight, bias, stride), leaves)  # noqa: B023
            for convolve in (strided_products, plain)
        )
        assert_same(found, expected, tolerance)


def test_it_takes_views() -> None:
    torch.manual_seed(0)
    x_BTI = torch.randn(2, 6, 20).transpose(1, 2)[:, 3:]
    weight_OIK = torch.randn(4, 6, 3)
    assert_same([strided_products(x_BTI, weight_OIK, None, 2)], [plain(x_BTI, weight_OIK, None, 2)])


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 20, 6, requires_grad=frozen != 0), torch.randn(4, 6, 3, requires_grad=frozen != 1)]
    strided_products(leaves[0], leaves[1], None, 2).square().sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [frozen == 0, frozen == 1]


@pytest.mark.parametrize("convolve", [strided_products, plain])
def test_in_bf16_it_is_as_exact_as_a_matrix_product(convolve: object) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 50, 64).bfloat16(), torch.randn(32, 64, 3).bfloat16(), torch.randn(32).bfloat16()]
    exact = [x.double() for x in leaves]
    found, expected = (
        outputs_and_gradients(lambda x, weight, bias: function(x, weight, bias, 2), given)  # noqa: B023
        for function, given in ((convolve, leaves), (plain, exact))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16 and error(one, other) < 2**-7


def test_autocast_changes_neither_value_nor_gradients() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 50, 64), torch.randn(32, 64, 3)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(outputs_and_gradients(lambda x, weight: strided_products(x, weight, None, 2), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, 64])
def test_on_a_gpu(inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 333, inputs), torch.randn(64, inputs, 3), torch.randn(64)]
    found = outputs_and_gradients(
        lambda x, weight, bias: strided_convolution(x, weight, bias, 2), [x.to("cuda", dtype) for x in leaves]
    )
    expected = outputs_and_gradients(
        lambda x, weight, bias: F.conv1d(x.transpose(1, 2), weight, bias, 2).transpose(1, 2),
        [x.double() for x in leaves],
    )
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < (2**-7 if dtype == torch.bfloat16 else 1e-5)
