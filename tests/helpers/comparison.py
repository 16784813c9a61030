"""A kernel beside its plain operation: outputs and gradients, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RELATIVE = 1e-5
"""How far a kernel may be from the plain operation in fp32, as a share of a tensor's norm."""


def outputs_and_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """`function(*leaves)`, then the gradient of each leaf, for one and the same random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every type
    return [y.detach(), *torch.autograd.grad(y, leaves, given.to(y.device, y.dtype))]


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the expected norm."""
    assert found.shape == expected.shape
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    norm = float(expected.norm())
    return float((found - expected).norm()) / norm if norm else float(found.norm())


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = RELATIVE) -> None:
    """Equal types and shapes, and equal values but for `tolerance` (relative)."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert error(one, other) <= tolerance, number
