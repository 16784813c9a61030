"""The convolutional feature encoder: waveform to one feature vector per 20 ms (Baevski et al. 2020, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import ModelConfig
from w2vscale.models.layers import LayerNorm


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
    """A stack of strided convolutions. An utterance gives the same frames alone and padded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inputs = (1, *(channels for channels, _, _ in config.conv_layers))
        self.layers = nn.ModuleList(ConvLayer(config, index, inputs[index]) for index in range(len(config.conv_layers)))

    def forward(
        self, waveforms_BS: Tensor, lengths_B: Tensor | None, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Features [B, T, C]. `lengths_B` in samples, or None where no utterance is padded.

        `statistics`: GroupNorm's mean and variance [B, groups], where they are not those of these waveforms.
        """
        x_BCT = waveforms_BS.unsqueeze(1)
        for layer in self.layers:
            x_BCT, lengths_B = layer(x_BCT, lengths_B, statistics)
        return x_BCT.transpose(1, 2)


class ConvLayer(nn.Module):
    """Convolution, normalisation, GELU."""

    def __init__(self, config: ModelConfig, index: int, inputs: int) -> None:
        super().__init__()
        channels, kernel, self.stride = config.conv_layers[index]
        self.padding = _padding(kernel, config)
        self.kernel = kernel
        next_layer = config.conv_layers[index + 1 : index + 2]
        self.next_is_padded = any(_padding(kernel, config) for _, kernel, _ in next_layer)
        self.weight = nn.Parameter(torch.empty(channels, inputs, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if config.conv_bias else None
        self.reset_parameters()
        self.norm: nn.Module | None = None
        if config.conv_norm == "layer":
            self.norm = ChannelLayerNorm(channels)
        elif index == 0:
            self.norm = MaskedGroupNorm(config.conv_norm_groups, channels)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x_BCT: Tensor, lengths_B: Tensor | None, statistics: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x_BCT = self.convolve(x_BCT, self.padding)
        if lengths_B is not None:
            lengths_B = (lengths_B + (2 * self.padding - self.kernel)).div(self.stride, rounding_mode="floor") + 1
        if isinstance(self.norm, MaskedGroupNorm):
            x_BCT = self.norm(x_BCT, lengths_B, statistics)
        elif self.norm is not None:
            x_BCT = self.norm(x_BCT)
        x_BCT = F.gelu(x_BCT)
        if lengths_B is not None and self.next_is_padded:
            # The next layer's padding must meet silence where the utterance ends, as it does alone.
            x_BCT = x_BCT * valid_mask(lengths_B, x_BCT.shape[2]).unsqueeze(1)
        return x_BCT, lengths_B

    def convolve(self, x_BCT: Tensor, padding: int) -> Tensor:
        """The convolution alone."""
        bias = None if self.bias is None else self.bias.to(x_BCT.dtype)
        return F.conv1d(x_BCT, self.weight.to(x_BCT.dtype), bias, stride=self.stride, padding=padding)


class ChannelLayerNorm(LayerNorm):
    """LayerNorm over the channels of [B, C, T]."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        return super().forward(x_BCT.transpose(1, 2)).transpose(1, 2)


class MaskedGroupNorm(nn.Module):
    """GroupNorm whose statistics are taken over the valid steps of each utterance, in fp32."""

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

    def forward(
        self, x_BCT: Tensor, lengths_B: Tensor | None, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        if statistics is not None:
            return self._normalised_with(x_BCT, *statistics)
        if lengths_B is None:
            bias, weight = self.bias.to(x_BCT.dtype), self.weight.to(x_BCT.dtype)
            return F.group_norm(x_BCT, self.groups, weight, bias, self.eps)
        batch, channels, steps = x_BCT.shape
        x = x_BCT.float().view(batch, self.groups, channels // self.groups, steps)
        valid = valid_mask(lengths_B, steps).view(batch, 1, 1, steps)
        count = (lengths_B * (channels // self.groups)).view(batch, 1, 1, 1)
        mean = (x * valid).sum(dim=(2, 3), keepdim=True) / count
        centred = (x - mean) * valid
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normalised = (centred * torch.rsqrt(variance + self.eps)).view(batch, channels, steps)
        # Bias before weight, as above, so that gradients arrive in one order: ZeRO-2 adds up what arrives together.
        bias_C1 = self.bias.float().unsqueeze(1)
        weight_C1 = self.weight.float().unsqueeze(1)
        return torch.addcmul(bias_C1, normalised, weight_C1).to(x_BCT.dtype)

    def _normalised_with(self, x_BCT: Tensor, mean_BG: Tensor, variance_BG: Tensor) -> Tensor:
        repeats = x_BCT.shape[1] // self.groups
        mean_BC1, variance_BC1 = (x.repeat_interleave(repeats, dim=1).unsqueeze(2) for x in (mean_BG, variance_BG))
        scale_BC1 = torch.rsqrt(variance_BC1 + self.eps) * self.weight.float().unsqueeze(1)
        return ((x_BCT.float() - mean_BC1) * scale_BC1 + self.bias.float().unsqueeze(1)).to(x_BCT.dtype)


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
