"""Our own operators, taken apart, for what watches each operation."""

from __future__ import annotations

from w2vscale.kernels import folded_group_norm, strided_products

PARTS = {
    operator._opoverload: operator._init_fn
    for operator in (
        strided_products._convolve,
        strided_products._gradient_of_input,
        strided_products._gradient_of_weight,
        folded_group_norm._products,
    )
}
"""The Python function that computes each operator, from PyTorch's operations."""
