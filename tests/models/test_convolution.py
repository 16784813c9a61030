"""The convolution of the feature encoder against PyTorch's, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.models.convolution import convolution_in_blocks, long_convolution, strided_convolution


@pytest.mark.parametrize("frames", [10, 11, 12, 37])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (10, 5), (8, 4), (4, 3), (5, 1), (2, 3), (1, 1)])
def test_it_is_pytorchs(kernel: int, stride: int, frames: int) -> None:
    torch.manual_seed(0)
    x_BTI = torch.randn(3, frames, 5, dtype=torch.float64, requires_grad=True)
    weight_OIK = torch.randn(4, 5, kernel, dtype=torch.float64, requires_grad=True)
    expected_BOT = F.conv1d(x_BTI.transpose(1, 2), weight_OIK, stride=stride)
    found_BTO = strided_convolution(x_BTI, weight_OIK, stride)
    torch.testing.assert_close(found_BTO, expected_BOT.transpose(1, 2))
    given_BTO = torch.randn_like(found_BTO)
    found = torch.autograd.grad(found_BTO, (x_BTI, weight_OIK), given_BTO)
    expected = torch.autograd.grad(expected_BOT, (x_BTI, weight_OIK), given_BTO.transpose(1, 2))
    torch.testing.assert_close(found, expected)


def test_it_takes_views_and_leaves_out_the_gradient_of_what_needs_none() -> None:
    torch.manual_seed(0)
    x_BTI = torch.randn(2, 6, 20).transpose(1, 2)[:, 3:]
    weight_OIK = torch.randn(4, 6, 3, requires_grad=True)
    found_BTO = strided_convolution(x_BTI, weight_OIK, 2)
    torch.testing.assert_close(found_BTO, F.conv1d(x_BTI.transpose(1, 2), weight_OIK, stride=2).transpose(1, 2))
    found_BTO.square().sum().backward()
    assert weight_OIK.grad is not None and weight_OIK.grad.shape == weight_OIK.shape


def test_in_bf16_it_is_as_exact_as_a_matrix_product() -> None:
    torch.manual_seed(0)
    x_BTI, weight_OIK = torch.randn(2, 50, 64).bfloat16(), torch.randn(32, 64, 3).bfloat16()
    expected = F.conv1d(x_BTI.double().transpose(1, 2), weight_OIK.double(), stride=2).transpose(1, 2)
    found = strided_convolution(x_BTI, weight_OIK, 2).double()
    assert float((found - expected).norm() / expected.norm()) < 2**-7


@pytest.mark.parametrize(
    ("convolve", "shapes", "last"),
    [
        (strided_convolution, ((2, 50, 64), (32, 64, 3)), 2),
        (convolution_in_blocks, ((2, 50, 12), (12, 4, 16)), 3),
    ],
)
def test_autocast_changes_neither_value_nor_gradients(
    convolve: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], last: int
) -> None:
    """`last` is the stride, or the number of groups."""
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y_BTO = convolve(*leaves, last)
            results.append([y_BTO, *torch.autograd.grad(y_BTO.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("frames", [1, 7, 16, 33, 50])
@pytest.mark.parametrize("kernel", [16, 5, 1, 2])
def test_the_long_one_is_pytorchs(kernel: int, frames: int) -> None:
    torch.manual_seed(0)
    groups, channels = 3, 12
    leaves = (
        torch.randn(2, frames, channels, dtype=torch.float64, requires_grad=True),
        torch.randn(channels, channels // groups, kernel, dtype=torch.float64, requires_grad=True),
        torch.randn(channels, dtype=torch.float64, requires_grad=True),
    )
    x_BTD, weight_DIK, bias_D = leaves
    y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight_DIK, bias_D, padding=kernel // 2, groups=groups)
    expected_BTD = y_BDT[:, :, :frames].transpose(1, 2)
    found_BTD = long_convolution(*leaves, groups)
    torch.testing.assert_close(found_BTD, expected_BTD)
    given_BTD = torch.randn_like(found_BTD)
    found = torch.autograd.grad(found_BTD, leaves, given_BTD)
    torch.testing.assert_close(found, torch.autograd.grad(expected_BTD, leaves, given_BTD))
    # In bf16 it is rounded once.
    x_BTD, weight_DIK, bias_D = (leaf.detach().bfloat16() for leaf in leaves)
    found_BTD = long_convolution(x_BTD, weight_DIK, bias_D, groups).double()
    x_BDT = x_BTD.double().transpose(1, 2)
    y_BDT = F.conv1d(x_BDT, weight_DIK.double(), bias_D.double(), padding=kernel // 2, groups=groups)
    torch.testing.assert_close(found_BTD, y_BDT[:, :, :frames].transpose(1, 2), rtol=2**-8, atol=1e-4)


def test_taps_that_see_padding_alone_have_no_gradient() -> None:
    torch.manual_seed(0)
    x_BTD, weight_DIK = torch.randn(2, 7, 12), torch.randn(12, 4, 16, requires_grad=True)
    long_convolution(x_BTD, weight_DIK, torch.zeros(12), 3).square().sum().backward()
    assert weight_DIK.grad is not None
    assert (weight_DIK.grad[:, :, :2] == 0).all() and (weight_DIK.grad[:, :, 2:15] != 0).any(dim=1).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 20, 6, requires_grad=frozen != 0), torch.randn(4, 6, 3, requires_grad=frozen != 1)]
    strided_convolution(leaves[0], leaves[1], 2).square().sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [frozen == 0, frozen == 1]


@pytest.mark.parametrize("frames", [1, 7, 8, 33, 150])
@pytest.mark.parametrize("kernel", [1, 2, 5, 16, 128])
def test_the_long_one_in_blocks_is_pytorchs(kernel: int, frames: int) -> None:
    """What GPUs compute, here on the CPU."""
    torch.manual_seed(0)
    groups, channels = 3, 12
    leaves = (
        torch.randn(2, frames, channels, dtype=torch.float64, requires_grad=True),
        torch.randn(channels, channels // groups, kernel, dtype=torch.float64, requires_grad=True),
    )
    y_BDT = F.conv1d(leaves[0].transpose(1, 2), leaves[1], padding=kernel // 2, groups=groups)
    expected_BTD = y_BDT[:, :, :frames].transpose(1, 2)
    found_BTD = convolution_in_blocks(*leaves, groups)
    torch.testing.assert_close(found_BTD, expected_BTD)
    given_BTD = torch.randn_like(found_BTD)
    found = torch.autograd.grad(found_BTD, leaves, given_BTD)
    torch.testing.assert_close(found, torch.autograd.grad(expected_BTD, leaves, given_BTD))


def test_in_blocks_no_value_is_asked_for() -> None:
    """On the meta device, where nothing has one."""
    x_BTD = torch.empty(2, 50, 12, device="meta", requires_grad=True)
    weight_DIK = torch.empty(12, 4, 16, device="meta", requires_grad=True)
    convolution_in_blocks(x_BTD, weight_DIK, 3).sum().backward()
    assert x_BTD.grad is not None and weight_DIK.grad is not None


@pytest.mark.cuda
@pytest.mark.parametrize("frames", [5, 100, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_long_one_on_a_gpu(dtype: torch.dtype, frames: int) -> None:
    torch.manual_seed(0)
    groups, channels, kernel = 16, 768, 128
    exact = (
        torch.randn(3, frames, channels, dtype=torch.float64, requires_grad=True),
        torch.randn(channels, channels // groups, kernel, dtype=torch.float64, requires_grad=True),
        torch.randn(channels, dtype=torch.float64, requires_grad=True),
    )
    y_BDT = F.conv1d(exact[0].transpose(1, 2), exact[1], exact[2], padding=kernel // 2, groups=groups)
    expected_BTD = y_BDT[:, :, :frames].transpose(1, 2)
    leaves = [leaf.detach().to("cuda", dtype).requires_grad_() for leaf in exact]
    found_BTD = long_convolution(*leaves, groups)
    given_BTD = torch.randn(3, frames, channels, dtype=torch.float64)
    found = [found_BTD, *torch.autograd.grad(found_BTD, leaves, given_BTD.to("cuda", dtype))]
    expected = [expected_BTD, *torch.autograd.grad(expected_BTD, exact, given_BTD)]
    for one, other in zip(found, expected, strict=True):
        assert float((one.cpu().double() - other).norm() / other.norm()) < (2**-7 if dtype == torch.bfloat16 else 1e-5)
