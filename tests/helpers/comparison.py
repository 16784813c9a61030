"""Compare outputs and gradients of a kernel with those of the plain operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RELATIVE = 1e-5
"""Largest allowed difference in fp32, relative to the norm of the tensor."""


def outputs_and_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """`function(*leaves)`, then the gradient of each leaf. The gradient of the output is random, from a fixed seed."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every type
    return [y.detach(), *torch.autograd.grad(y, leaves, given.to(y.device, y.dtype))]


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of `expected`."""
    assert found.shape == expected.shape
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    norm = float(expected.norm())
    return float((found - expected).norm()) / norm if norm else float(found.norm())


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = RELATIVE) -> None:
    """Assert that types and shapes are equal, and values within `tolerance` (relative)."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert error(one, other) <= tolerance, number
