"""The convolutional feature encoder: waveform to one feature vector per 20 ms (Baevski et al. 2020, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import ModelConfig
from w2vscale.models.convolution import strided_convolution
from w2vscale.models.layers import LayerNorm
from w2vscale.models.products import linear, matmul


def output_frames(samples: int, config: ModelConfig) -> int:
    """Frames that an utterance of `samples` samples gives (0 if it is too short)."""
    for _, kernel, stride in config.conv_layers:
        samples = max((samples + 2 * _padding(kernel, config) - kernel) // stride + 1, 0)
    return samples


def input_samples(frames: int, config: ModelConfig) -> int:
    """Samples of the shortest utterance that gives `frames` frames, at least one."""
    samples = frames
    for _, kernel, stride in reversed(config.conv_layers):
        samples = max((samples - 1) * stride + kernel - 2 * _padding(kernel, config), 1)
    return samples


class FeatureEncoder(nn.Module):
    """A stack of strided convolutions, channels last. An utterance gives the same frames alone and padded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [WaveformLayer(config)]
        layers += [ConvLayer(config, index) for index in range(1, len(config.conv_layers))]
        self.layers = nn.ModuleList(layers)

    def forward(self, waveforms_BS: Tensor, lengths_B: Tensor | None, moments_BJJ: Tensor | None = None) -> Tensor:
        """Features [B, T, C]. `lengths_B` in samples, or None where no utterance is padded.

        `moments_BJJ`: of the first layer's taps (`moments_of`), where GroupNorm's statistics are not those of these
        waveforms.
        """
        first, *others = self.layers
        x_BTC, lengths_B = first(waveforms_BS, lengths_B, moments_BJJ)
        for layer in others:
            x_BTC, lengths_B = layer(x_BTC, lengths_B)
        return x_BTC


class ConvLayer(nn.Module):
    """Convolution, LayerNorm where the model has one, GELU."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        channels, self.kernel, self.stride = config.conv_layers[index]
        inputs = config.conv_layers[index - 1][0] if index else 1
        self.padding = _padding(self.kernel, config)
        next_layer = config.conv_layers[index + 1 : index + 2]
        self.next_is_padded = any(_padding(kernel, config) for _, kernel, _ in next_layer)
        self.weight = nn.Parameter(torch.empty(channels, inputs, self.kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if config.conv_bias else None
        self.reset_parameters()
        self.norm: nn.Module | None = LayerNorm(channels) if config.conv_norm == "layer" else None

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTC: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.padding:
            x_BTC = F.pad(x_BTC, (0, 0, self.padding, self.padding))
        x_BTC = strided_convolution(x_BTC, self.weight.to(x_BTC.dtype), self.stride)
        if self.bias is not None:
            x_BTC = x_BTC + self.bias.to(x_BTC.dtype)
        lengths_B = self.output_lengths(lengths_B)
        if self.norm is not None:
            x_BTC = self.norm(x_BTC)
        return self.silenced(F.gelu(x_BTC), lengths_B), lengths_B

    def output_lengths(self, lengths_B: Tensor | None) -> Tensor | None:
        """Frames of each utterance, from those of the layer's input."""
        if lengths_B is None:
            return None
        return (lengths_B + (2 * self.padding - self.kernel)).div(self.stride, rounding_mode="floor") + 1

    def silenced(self, x_BTC: Tensor, lengths_B: Tensor | None) -> Tensor:
        """The next layer's padding must meet silence where the utterance ends, as it does alone."""
        if lengths_B is None or not self.next_is_padded:
            return x_BTC
        return x_BTC * valid_mask(lengths_B, x_BTC.shape[1]).unsqueeze(2)


class WaveformLayer(ConvLayer):
    """The first layer: a matrix product of the waveform's taps. GroupNorm costs next to nothing, see `GroupNorm`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, 0)
        if config.conv_norm == "group":
            self.norm = GroupNorm(config.conv_norm_groups, config.conv_layers[0][0])

    def forward(
        self, waveforms_BS: Tensor, lengths_B: Tensor | None, moments_BJJ: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        taps_BTJ = self.taps(F.pad(waveforms_BS, (self.padding, self.padding)))
        lengths_B = self.output_lengths(lengths_B)
        if lengths_B is not None:
            taps_BTJ = taps_BTJ * valid_mask(lengths_B, taps_BTJ.shape[1]).unsqueeze(2)
        weight_CJ = (
            self.weight.squeeze(1)
            if self.bias is None
            else torch.cat([self.weight.squeeze(1), self.bias.unsqueeze(1)], dim=1)
        )
        weight_CJ = F.pad(weight_CJ, (0, taps_BTJ.shape[2] - weight_CJ.shape[1]))
        if isinstance(self.norm, GroupNorm):
            if moments_BJJ is None:
                moments_BJJ = moments_of(taps_BTJ, lengths_B)
            weight_BCJ = self.norm(weight_CJ, moments_BJJ, one=self.kernel)
            weight_BCJ = rounded(weight_BCJ, taps_BTJ.dtype, moments_BJJ[:, self.kernel], spare=self.kernel + 1)
            x_BTC = matmul(taps_BTJ, weight_BCJ.transpose(1, 2))
        else:
            x_BTC = linear(taps_BTJ, weight_CJ.to(taps_BTJ.dtype))
            if self.norm is not None:
                x_BTC = self.norm(x_BTC)
        return self.silenced(F.gelu(x_BTC), lengths_B), lengths_B

    def taps(self, waveforms_BS: Tensor) -> Tensor:
        """Each frame's `kernel` samples, two ones for the bias, and zeros up to a multiple of eight: [B, T, J]."""
        windows_BTK = waveforms_BS.unfold(1, self.kernel, self.stride)
        taps_BTJ = F.pad(windows_BTK, (0, 2 + -(self.kernel + 2) % 8))
        taps_BTJ[:, :, self.kernel : self.kernel + 2] = 1.0
        return taps_BTJ


def moments_of(taps_BTJ: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Mean products [B, J, J] of taps over an utterance's frames, in fp64. Taps behind its end are zeros."""
    exact_BTJ = taps_BTJ.double()
    sums_BJJ = exact_BTJ.transpose(1, 2) @ exact_BTJ
    return sums_BJJ / (taps_BTJ.shape[1] if lengths_B is None else lengths_B.view(-1, 1, 1))


def rounded(weight_BCJ: Tensor, dtype: torch.dtype, means_BJ: Tensor, *, spare: int) -> Tensor:
    """Weights in `dtype`. What rounding them changes of the mean over all frames is mended by those of tap `spare`."""
    rounded_BCJ = weight_BCJ.to(dtype)
    missing_BC1 = ((weight_BCJ - rounded_BCJ).detach() @ means_BJ.unsqueeze(2)).to(dtype)
    return rounded_BCJ + F.pad(missing_BC1, (spare, weight_BCJ.shape[2] - spare - 1))


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) over the frames of an utterance, of a convolution that has not been computed yet.

    Means and variances of w·x over all frames follow from the products of the few taps x: wᵀE[x] and wᵀE[xxᵀ]w. So the
    norm becomes part of the convolution's weights, and nothing of the length of the audio is normalised.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, weight_CJ: Tensor, moments_BJJ: Tensor, *, one: int) -> Tensor:
        """Weights [B, C, J] of the normalised convolution, in fp64. Tap number `one` is 1 in all frames."""
        weight_CJ = weight_CJ.double()
        products_BCJ = weight_CJ @ moments_BJJ
        batch, channels, taps = products_BCJ.shape
        grouped = (batch, self.groups, channels // self.groups)
        mean_BG1 = products_BCJ[:, :, one].view(grouped).mean(dim=2, keepdim=True)
        square_BG1 = (products_BCJ * weight_CJ).sum(dim=2).view(grouped).mean(dim=2, keepdim=True)
        deviation_BG1 = ((square_BG1 - mean_BG1.square()).clamp(min=0.0) + self.eps).sqrt()
        scale_BGN = self.weight.double().view(1, *grouped[1:]) / deviation_BG1
        shift_BC = self.bias.double() - (mean_BG1 * scale_BGN).view(batch, channels)
        return weight_CJ * scale_BGN.reshape(batch, channels, 1) + F.pad(shift_BC.unsqueeze(2), (one, taps - one - 1))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x`, whose gradient is multiplied by `scale` on the way back."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)


def valid_mask(lengths_B: Tensor, steps: int) -> Tensor:
    """[B, steps] bool: True inside each utterance."""
    return torch.arange(steps, device=lengths_B.device) < lengths_B.unsqueeze(1)


def _padding(kernel: int, config: ModelConfig) -> int:
    return (kernel - 1) // 2 if config.conv_padding else 0
