"""The operations that have several forms on a GPU: what each form costs, including its first call on a new shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.bench.phases.measuring import (
    Machine,
    Rows,
    attempt,
    forward_and_backward,
    median_ms,
    one_ms,
)
from w2vscale.config import Config
from w2vscale.kernels.blocked_convolution import blocked_convolution
from w2vscale.kernels.folded_group_norm import folded_group_norm
from w2vscale.kernels.frequency_convolution import frequency_convolution
from w2vscale.kernels.packed_attention import packed_attention
from w2vscale.kernels.packing import Lengths, Packing
from w2vscale.kernels.replaceable import kernels
from w2vscale.kernels.strided_products import strided_products
from w2vscale.models.lengths import input_samples, output_frames
from w2vscale.models.wav2vec2 import normalized_convolution, valid_mask

DROPOUT = 0.1
SHAPES = 40
"""Different (utterances, frames) that a form meets."""

SHAPE_SECONDS = 9.0
"""After which a form meets no more shapes."""


def operations(machine: Machine) -> Rows:
    """Milliseconds of forward and backward of each form of each operation, at the sizes of `base` and `large`.

    A forward of 20 utterances in bf16; those of padded forms differ in length by up to 3 %.
    """
    for name, seconds in (("base", 15.6), ("large", 20.0)):
        config = machine.config(name)
        utterances, seconds = (1, 0.5) if machine.tiny else (20, seconds)
        samples = int(seconds * config.model.sampling_rate)
        frames = output_frames(samples, config.model)
        for form in POSITIONAL:
            yield (
                f"{name}/positional/{form}",
                attempt(partial(_positional_ms, machine, config, form, utterances, frames)),
            )
        for form in ATTENTION:
            yield f"{name}/attention/{form}", attempt(partial(_attention_ms, machine, config, form, utterances, frames))
        if name == "base":  # `large` has the same feature encoder
            for layer in (1, 5):
                for form in STRIDED:
                    measure = partial(_strided_ms, machine, config, form, layer, utterances, samples)
                    yield f"{name}/convolution {layer}/{form}", attempt(measure)
            for form in FIRST_LAYER:
                measure = partial(_first_layer_ms, machine, config, form, utterances, samples)
                yield f"{name}/convolution 0/{form}", attempt(measure)


def new_shapes(machine: Machine) -> Rows:
    """Milliseconds of forward and backward for each of `SHAPES` shapes, when it is new and the second time."""
    config = machine.config("base")
    draws = np.random.default_rng(0)
    count, longest = (2, 40) if machine.tiny else (SHAPES, 780)
    frames = draws.choice(np.arange(longest // 3, longest), size=count, replace=False)
    shapes = [(max(1, int(5 * longest // frame)), int(frame)) for frame in frames]
    kinds = (
        ("attention", ATTENTION, _attention),
        ("positional", POSITIONAL, _positional),
        ("second layer", STRIDED, _second_layer),
    )
    for kind, forms, prepare in kinds:
        for form in forms:
            yield f"{kind}/{form}", attempt(partial(_first_and_second, machine, config, form, prepare, shapes))


def _first_and_second(
    machine: Machine,
    config: Config,
    form: str,
    prepare: Callable[[Machine, Config, str, int, int], Callable[[], None]],
    shapes: list[tuple[int, int]],
) -> dict[str, Any]:
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    prepare(machine, config, form, *largest)()  # what is loaded once, and the memory for all
    first, second = [], []
    for utterances, frames in shapes:
        work = prepare(machine, config, form, utterances, frames)
        first.append(one_ms(work, machine.device))
        second.append(min(one_ms(work, machine.device) for _ in range(2)))
        if sum(first) > 1000 * SHAPE_SECONDS:
            break
    return {
        "shapes": len(first),
        "first_ms": float(np.median(first)),
        "first_ms_worst": max(first),
        "second_ms": float(np.median(second)),
        "extra_seconds": (sum(first) - sum(second)) / 1000,
    }


# --- the positional convolution -------------------------------------------------------------------------------------

Positional = Callable[[Tensor, Tensor, int], Tensor]
"""From frames [B, T, D] and weights [D, D / groups, K], with K // 2 frames of padding, to the first T frames."""


def direct(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """`F.conv1d`."""
    y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight_DIK, padding=weight_DIK.shape[2] // 2, groups=groups)
    return y_BDT[:, :, : x_BTD.shape[1]].transpose(1, 2)


def channels_last(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """`F.conv2d` of one row, with channels last in memory: no copy of the frames."""
    weight = weight_DIK.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    x_BD1T = x_BTD.transpose(1, 2).unsqueeze(2)
    y_BD1T = F.conv2d(x_BD1T, weight, padding=(0, weight_DIK.shape[2] // 2), groups=groups)
    return y_BD1T.squeeze(2)[:, :, : x_BTD.shape[1]].transpose(1, 2)


def searched(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """`F.conv1d` with cuDNN's search for the fastest forward kernel of each shape."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return direct(x_BTD, weight_DIK, groups)


def by_frequency(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """Products of spectra in fp32, as on CPUs."""
    return frequency_convolution(x_BTD, weight_DIK, _no_bias(x_BTD), groups)


def in_blocks(x_BTD: Tensor, weight_DIK: Tensor, groups: int) -> Tensor:
    """Products of overlapping windows with a banded matrix."""
    return blocked_convolution(x_BTD, weight_DIK, _no_bias(x_BTD), groups)


def _no_bias(x_BTD: Tensor) -> Tensor:
    return x_BTD.new_zeros(x_BTD.shape[2])


POSITIONAL: dict[str, Positional] = {
    "conv1d": direct,
    "conv1d, searched": searched,
    "conv2d, channels last": channels_last,
    "by frequency": by_frequency,
    "in blocks": in_blocks,
}


def _positional(machine: Machine, config: Config, form: str, utterances: int, frames: int) -> Callable[[], None]:
    model, device = config.model, machine.device
    x_BTD = _random(utterances, frames, model.dim, device=device)
    weight_DIK = _random(model.dim, model.dim // model.positional_groups, model.positional_kernel, device=device)
    return forward_and_backward(
        lambda x, weight: POSITIONAL[form](x, weight, model.positional_groups), x_BTD, weight_DIK
    )


def _positional_ms(machine: Machine, config: Config, form: str, utterances: int, frames: int) -> float:
    return median_ms(_positional(machine, config, form, utterances, frames), machine.device, repeats=_repeats(machine))


# --- attention ------------------------------------------------------------------------------------------------------


def _attend(backend: SDPBackend, *, masked: bool = False, dropout: float = DROPOUT) -> Callable[..., Tensor]:
    def attend(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, frames_B: Tensor) -> Tensor:
        mask = None
        if masked:
            mask = valid_mask(frames_B, q_BTHE.shape[1])[:, None, None]
        with sdpa_kernel(backend):
            y_BHTE = F.scaled_dot_product_attention(
                q_BTHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2), mask, dropout_p=dropout
            )
        return y_BHTE.transpose(1, 2)

    return attend


def _in_segments(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, frames_B: Tensor) -> Tensor:
    """Nothing is packed: the padding behind each utterance is a sequence of its own."""
    batch, steps = q_BTHE.shape[:2]
    bounds = torch.arange(2 * batch + 1, dtype=torch.int32, device=frames_B.device) // 2 * steps
    bounds[1::2] += frames_B.int()
    qkv = [x_BTHE.flatten(0, 1) for x_BTHE in (q_BTHE, k_BTHE, v_BTHE)]
    flash = torch.ops.aten._flash_attention_forward
    y_NHE: Tensor = flash(*qkv, bounds, bounds, steps, steps, DROPOUT, False, False)[0]
    return y_NHE


def _packed(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing) -> Tensor:
    return packed_attention(q_NHE, k_NHE, v_NHE, packing, DROPOUT)


PACKED = "flash, packed"
"""The form of attention that takes valid frames only."""

ATTENTION: dict[str, Callable[..., Tensor]] = {
    "cuDNN": _attend(SDPBackend.CUDNN_ATTENTION),
    "cuDNN, masked": _attend(SDPBackend.CUDNN_ATTENTION, masked=True),
    "flash": _attend(SDPBackend.FLASH_ATTENTION),
    "flash, without dropout": _attend(SDPBackend.FLASH_ATTENTION, dropout=0.0),
    "flash, in segments": _in_segments,
    PACKED: _packed,
    "memory-efficient": _attend(SDPBackend.EFFICIENT_ATTENTION),
    "memory-efficient, masked": _attend(SDPBackend.EFFICIENT_ATTENTION, masked=True),
    "math, masked": _attend(SDPBackend.MATH, masked=True),
}


def _attention(machine: Machine, config: Config, form: str, utterances: int, frames: int) -> Callable[[], None]:
    model, device = config.model, machine.device
    on_host = torch.from_numpy(np.random.default_rng(0).integers(int(0.97 * frames), frames + 1, utterances))
    frames_B, total = on_host.to(device), int(on_host.sum())
    if form == PACKED:
        lengths = Lengths(frames_B, frames_B, total)
        described: Any = Packing.of(torch.empty(utterances, frames, 0, device=device), lengths)
    else:
        described = frames_B
    shape = (total,) if form == PACKED else (utterances, frames)
    qkv = [_random(*shape, model.heads, model.dim // model.heads, device=device) for _ in range(3)]
    return forward_and_backward(lambda *leaves: ATTENTION[form](*leaves, described), *qkv)


def _attention_ms(machine: Machine, config: Config, form: str, utterances: int, frames: int) -> float:
    return median_ms(_attention(machine, config, form, utterances, frames), machine.device, repeats=_repeats(machine))


# --- the feature encoder --------------------------------------------------------------------------------------------


def _conv1d(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    """Both sides channels first in memory, as where a whole feature encoder is."""
    return F.conv1d(x_BTI.transpose(1, 2), weight_OIK, stride=stride)


def _conv2d(x_BTI: Tensor, weight_OIK: Tensor, stride: int) -> Tensor:
    """Channels last in memory."""
    weight = weight_OIK.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x_BTI.transpose(1, 2).unsqueeze(2), weight, stride=(1, stride)).squeeze(2)


STRIDED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "strided products": lambda x_BTI, weight_OIK, stride: strided_products(x_BTI, weight_OIK, None, stride),
    "conv1d": _conv1d,
    "conv2d, channels last": _conv2d,
}


def _strided(
    machine: Machine, config: Config, form: str, layer: int, utterances: int, samples: int
) -> Callable[[], None]:
    steps = samples
    for _, kernel, stride in config.model.conv_layers[:layer]:
        steps = (steps - kernel) // stride + 1
    outputs, kernel, stride = config.model.conv_layers[layer]
    inputs = config.model.conv_layers[layer - 1][0]
    x_BTI = _random(utterances, steps, inputs, device=machine.device)
    if form == "conv1d":
        x_BTI = x_BTI.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight_OIK = _random(outputs, inputs, kernel, device=machine.device)
    return forward_and_backward(lambda x, weight: STRIDED[form](x, weight, stride), x_BTI, weight_OIK)


def _strided_ms(machine: Machine, config: Config, form: str, layer: int, utterances: int, samples: int) -> float:
    work = _strided(machine, config, form, layer, utterances, samples)
    return median_ms(work, machine.device, repeats=_repeats(machine))


def _second_layer(machine: Machine, config: Config, form: str, utterances: int, frames: int) -> Callable[[], None]:
    return _strided(machine, config, form, 1, utterances, input_samples(frames, config.model))


FIRST_LAYER: dict[str, Callable[..., Tensor]] = {"folded GroupNorm": folded_group_norm, "plain": normalized_convolution}


def _first_layer_ms(machine: Machine, config: Config, form: str, utterances: int, samples: int) -> float:
    """Convolution and GroupNorm."""
    model = config.model
    channels, kernel, stride = model.conv_layers[0]
    x_BTI = torch.randn(utterances, samples, 1, device=machine.device).bfloat16()
    shapes = ((channels, 1, kernel), (channels,), (channels,))
    parameters = [torch.randn(shape, device=machine.device, requires_grad=True) for shape in shapes]

    def convolve(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return FIRST_LAYER[form](
            x_BTI, None, weight, None, scale, shift, stride=stride, groups=model.conv_norm_groups, eps=1e-5
        )

    with kernels("plain"):
        work = forward_and_backward(convolve, *parameters)
        return median_ms(work, machine.device, repeats=_repeats(machine))


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


def _repeats(machine: Machine) -> int:
    return 1 if machine.tiny else 10
