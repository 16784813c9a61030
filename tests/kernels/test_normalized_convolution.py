"""GroupNorm folded into the first convolution against GroupNorm after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.comparison import assert_same, error, outputs_and_gradients
from w2vscale.kernels.folded_group_norm import folded_group_norm, folded_statistics
from w2vscale.kernels.replaceable import kernels
from w2vscale.models.wav2vec2 import Statistics, convolution_statistics, normalized_convolution, valid_mask

CHANNELS, STRIDE = 12, 5
FORMS = [normalized_convolution.__wrapped__, folded_group_norm]


def run(
    convolve: Callable[..., Tensor],
    waveforms_BS: Tensor,
    parameters: list[Tensor],
    *,
    steps_B: Tensor | None = None,
    groups: int = CHANNELS,
    statistics: Statistics | None = None,
) -> list[Tensor]:
    """Output, and gradients of weight, [bias,] scale and shift."""
    kernel = parameters[0].shape[2]
    valid_BT = None if steps_B is None else valid_mask(steps_B, (waveforms_BS.shape[1] - kernel) // STRIDE + 1)

    def normalised(weight: Tensor, *others: Tensor) -> Tensor:
        *bias, scale, shift = others
        return convolve(
            waveforms_BS.unsqueeze(2),
            valid_BT,
            weight,
            bias[0] if bias else None,
            scale,
            shift,
            stride=STRIDE,
            groups=groups,
            eps=1e-5,
            statistics=statistics,
        )

    with kernels("plain"):  # the convolution inside the plain operation has a kernel too
        return outputs_and_gradients(normalised, parameters)


def parameters_of(kernel: int, *, bias: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(CHANNELS, 1, kernel), *[(CHANNELS,)] * (3 if bias else 2)]
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [12, 4, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("samples", "kernel"), [(1001, 10), (57, 7), (403, 6)])
def test_it_is_the_plain_one(samples: int, kernel: int, padded: bool, groups: int, bias: bool) -> None:
    parameters = parameters_of(kernel, bias=bias)
    waveforms_BS = 0.1 + torch.randn(3, samples)
    steps = (samples - kernel) // STRIDE + 1
    steps_B = torch.tensor([steps, steps - 3, steps // 2]) if padded else None
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        given = [x.to(dtype) for x in parameters]
        folded, plain = (run(form, waveforms_BS.to(dtype), given, steps_B=steps_B, groups=groups) for form in FORMS)
        # The norm removes a bias that all channels of a group share, so that its gradient may be only rounding error.
        size = max(float(x.norm()) for x in plain[1:])
        for one, other in zip(folded, plain, strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 0.1 * size)


@pytest.mark.parametrize("form", FORMS)
def test_frames_behind_an_utterance_are_zero(form: Callable[..., Tensor]) -> None:
    y_BTO, *_ = run(form, torch.randn(2, 57), parameters_of(7, bias=True), steps_B=torch.tensor([11, 4]))
    assert y_BTO[0].all() and y_BTO[1, :4].all() and not y_BTO[1, 4:].any()


@pytest.mark.parametrize("form", FORMS)
def test_statistics_may_be_given(form: Callable[..., Tensor]) -> None:
    """Encoding half of a waveform with the statistics of the whole gives half of the result."""
    parameters = parameters_of(7, bias=True)
    waveforms_BS = torch.randn(1, 2 * 50 * STRIDE + 2)
    y_1OT = F.conv1d(waveforms_BS.unsqueeze(1), parameters[0], parameters[1], STRIDE)
    variance_1G, mean_1G = torch.var_mean(y_1OT.unflatten(1, (4, 3)), dim=(2, 3), correction=0)
    whole_1TO, *_ = run(form, waveforms_BS, parameters, groups=4)
    half_BS = waveforms_BS[:, : 50 * STRIDE + 2]
    found_1TO, *_ = run(form, half_BS, parameters, groups=4, statistics=(mean_1G, variance_1G))
    assert_same([found_1TO], [whole_1TO[:, :50]])
    other_1TO, *_ = run(form, half_BS, parameters, groups=4)
    assert error(other_1TO, whole_1TO[:, :50]) > 1e-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [12, 4])
def test_statistics_are_the_plain_ones(groups: int, bias: bool) -> None:
    weight_O1K, *others = parameters_of(7, bias=bias)
    x_BT1 = 0.3 + torch.randn(2, 403, 1)
    found, expected = (
        form(x_BT1, weight_O1K, others[0] if bias else None, stride=STRIDE, groups=groups)
        for form in (folded_statistics, convolution_statistics.__wrapped__)
    )
    assert_same([x_BG.float() for x_BG in found], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [10, 6, 7])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_bf16_an_offset_of_the_waveform_leaves_nothing_behind(
    offset: float, kernel: int, form: Callable[..., Tensor]
) -> None:
    """GroupNorm removes the mean. If weights were rounded after folding, they would have another mean."""
    weight_O1K = torch.nn.init.kaiming_normal_(parameters_of(kernel, bias=False)[0])
    waveforms_BS = (offset + 0.1 * torch.randn(2, 4000)).bfloat16()
    found_BTO, *_ = run(form, waveforms_BS, [weight_O1K, torch.ones(CHANNELS), torch.zeros(CHANNELS)])
    y_BOT = F.conv1d(waveforms_BS.double().unsqueeze(1), weight_O1K.double(), stride=STRIDE)
    expected_BTO = F.group_norm(y_BOT, CHANNELS).transpose(1, 2)
    assert found_BTO.dtype == torch.bfloat16 and error(found_BTO, expected_BTO) < 2**-7
    assert float((found_BTO.double() - expected_BTO).mean(dim=1).abs().max()) < 3e-3


def test_several_input_channels_are_left_to_the_plain_operation() -> None:
    x_BTI, weight_OIK, ones_O = torch.randn(1, 20, 2), torch.randn(4, 2, 3), torch.ones(4)
    found = folded_group_norm(x_BTI, None, weight_OIK, None, ones_O, ones_O, stride=2, groups=4, eps=1e-5)
    assert found is NotImplemented
