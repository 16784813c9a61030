"""LayerNorm in bf16 and its sums over frames."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from w2vscale.kernels.layer_norm import bf16_layer_norm, native_layer_norm
from w2vscale.models.layers import layer_norm

plain = layer_norm.__wrapped__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_are_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=dtype) for shape in ((3, 7, 33), (33,), (33,))]
    expected = outputs_and_gradients(lambda *given: F.layer_norm(given[0], (33,), *given[1:]), leaves)
    for form in (plain, layer_norm, native_layer_norm):
        assert_same(outputs_and_gradients(lambda *given: form(*given, 1e-5), leaves), expected)  # noqa: B023
    assert bf16_layer_norm(*leaves, 1e-5) is NotImplemented


@pytest.mark.parametrize("form", [plain, bf16_layer_norm])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bf16_gradients_are_sums_in_fp32(weights: torch.dtype, form: object) -> None:
    torch.manual_seed(0)
    x_BTC = 0.5 + torch.randn(4, 2000, 64).bfloat16()
    leaves = [x_BTC, (1.0 + torch.rand(64)).to(weights), torch.randn(64).to(weights)]
    found, expected = (
        outputs_and_gradients(lambda *given: function(*given, 1e-5), tensors)  # noqa: B023
        for function, tensors in ((form, leaves), (plain, [x.double() for x in leaves]))
    )
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in leaves)]
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 2**-8


@pytest.mark.cuda
def test_on_a_gpu_in_bf16() -> None:
    torch.manual_seed(0)
    leaves = [0.5 + torch.randn(4, 2000, 64).bfloat16(), 1.0 + torch.rand(64), torch.randn(64)]
    found = outputs_and_gradients(lambda *given: layer_norm(*given, 1e-5), [x.to("cuda") for x in leaves])
    expected = outputs_and_gradients(lambda *given: plain(*given, 1e-5), [x.double() for x in leaves])
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 2**-7
