"""Which kernel replaces which operation, on which device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from w2vscale.kernels.blocked_convolution import blocked_convolution
from w2vscale.kernels.cpu_attention import attention_with_cpu_dropout
from w2vscale.kernels.folded_group_norm import folded_group_norm, folded_statistics
from w2vscale.kernels.frequency_convolution import frequency_convolution
from w2vscale.kernels.layer_norm import bf16_layer_norm, native_layer_norm
from w2vscale.kernels.packed_attention import packed_attention
from w2vscale.kernels.sixteen_bit_dropout import sixteen_bit_dropout
from w2vscale.kernels.strided_products import strided_products


class Kernel(NamedTuple):
    """A function with the signature of the operation that it replaces."""

    function: Callable[..., Any]  # returns NotImplemented for arguments that it does not handle
    traceable: bool = False  # whether torch.compile traces it; otherwise compiled code holds the plain operation


KERNELS = {
    ("attention", "cpu"): Kernel(attention_with_cpu_dropout),
    ("attention", "cuda"): Kernel(packed_attention, traceable=True),
    ("convolution_statistics", "cpu"): Kernel(folded_statistics, traceable=True),
    ("convolution_statistics", "cuda"): Kernel(folded_statistics, traceable=True),
    ("dropout", "cpu"): Kernel(sixteen_bit_dropout),
    ("layer_norm", "cpu"): Kernel(bf16_layer_norm),
    ("layer_norm", "cuda"): Kernel(native_layer_norm, traceable=True),
    ("normalized_convolution", "cpu"): Kernel(folded_group_norm, traceable=True),
    ("normalized_convolution", "cuda"): Kernel(folded_group_norm, traceable=True),
    ("positional_convolution", "cpu"): Kernel(frequency_convolution),
    ("positional_convolution", "cuda"): Kernel(blocked_convolution),
    ("strided_convolution", "cpu"): Kernel(strided_products, traceable=True),
    ("strided_convolution", "cuda"): Kernel(strided_products, traceable=True),
}
"""By (name of the plain operation, device type)."""
