"""The positional convolution by frequency and in blocks against `F.conv1d`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from w2vscale.kernels.blocked_convolution import blocked_convolution
from w2vscale.kernels.frequency_convolution import frequency_convolution
from w2vscale.models.wav2vec2 import positional_convolution

plain = positional_convolution.__wrapped__
GROUPS, CHANNELS = 3, 12


def tensors(frames: int, kernel: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input, weights and biases."""
    torch.manual_seed(0)
    shapes = ((2, frames, CHANNELS), (CHANNELS, CHANNELS // GROUPS, kernel), (CHANNELS,))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def run(convolve: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return outputs_and_gradients(lambda *given: convolve(*given, GROUPS), leaves)


@pytest.mark.parametrize("frames", [1, 7, 8, 33, 150])
@pytest.mark.parametrize("kernel", [1, 2, 5, 16, 128])
@pytest.mark.parametrize("convolve", [positional_convolution, blocked_convolution])
def test_it_is_the_plain_one(convolve: Callable[..., Tensor], kernel: int, frames: int) -> None:
    """On a CPU, `positional_convolution` works by frequency if there are enough frames."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        leaves = tensors(frames, kernel, dtype=dtype)
        assert_same(run(convolve, leaves), run(plain, leaves), tolerance)


@pytest.mark.parametrize("convolve", [positional_convolution, plain])
@pytest.mark.parametrize("frames", [5, 40])
def test_in_bf16_it_is_rounded_once(frames: int, convolve: Callable[..., Tensor]) -> None:
    leaves = tensors(frames, 16, dtype=torch.bfloat16)
    found, expected = run(convolve, leaves), run(plain, [x.double() for x in leaves])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("convolve", [positional_convolution, plain, blocked_convolution])
def test_autocast_changes_neither_value_nor_gradients(convolve: Callable[..., Tensor]) -> None:
    leaves = tensors(50, 16)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(run(convolve, leaves))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_taps_that_see_padding_alone_have_no_gradient() -> None:
    leaves = tensors(7, 16)
    assert frequency_convolution(*leaves, GROUPS) is NotImplemented
    _, _, of_weight_DIK, _ = run(positional_convolution, leaves)
    assert (of_weight_DIK[:, :, :2] == 0).all() and (of_weight_DIK[:, :, 2:15] != 0).any(dim=1).all()


def test_in_blocks_no_value_is_asked_for() -> None:
    """It runs on the meta device, where tensors have no values."""
    leaves = [x.to("meta").requires_grad_() for x in tensors(50, 16)]
    blocked_convolution(*leaves, GROUPS).sum().backward()
    assert all(x.grad is not None for x in leaves)


@pytest.mark.cuda
@pytest.mark.parametrize("frames", [5, 100, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, frames: int) -> None:
    torch.manual_seed(0)
    groups, channels, kernel = 16, 768, 128
    leaves = [
        torch.randn(3, frames, channels),
        torch.randn(channels, channels // groups, kernel),
        torch.randn(channels),
    ]
    found = outputs_and_gradients(
        lambda *given: positional_convolution(*given, groups), [x.to("cuda", dtype) for x in leaves]
    )
    expected = outputs_and_gradients(lambda *given: plain(*given, groups), [x.double() for x in leaves])
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < (2**-7 if dtype == torch.bfloat16 else 1e-5)
