"""The encoder of wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477), in plain PyTorch.

    waveforms [B, S] → feature encoder → LayerNorm → projection → masking → positional convolution → blocks [B, T, D]

Suffixes name dimensions: B utterances, S samples, T frames (of any layer), C, I or O channels, which come last, D the
width of the blocks, H heads of E channels. An utterance gives the same frames alone and in any batch: `valid_BT` is
True inside each utterance (it begins its row), or None where no utterance is padded. The blocks compute on the N valid
frames of all utterances, packed one after another (packing.py).

Functions marked `@replaceable` define what is computed. On some devices a function of w2vscale.kernels with the same
signature computes it faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import ModelConfig, RegularizationConfig
from w2vscale.kernels.packing import Lengths, Packing
from w2vscale.kernels.precision import widen, without_autocast
from w2vscale.kernels.replaceable import replaceable
from w2vscale.models.layers import LayerNorm, Linear, dropout
from w2vscale.models.lengths import conv_padding

normal_as_in_bert = partial(nn.init.normal_, std=0.02)
"""Draws the initial weights of attention and feed-forward (Devlin et al. 2019)."""

Statistics = tuple[Tensor, Tensor]
"""Mean and variance [B, G] of each utterance and group of channels."""


class EncoderOutput(NamedTuple):
    """What the encoder computes for B utterances of T frames."""

    features_BTC: Tensor  # of the feature encoder, before LayerNorm
    normalised_BTC: Tensor  # features after LayerNorm, never masked
    projected_BTD: Tensor  # normalised features after the projection, never masked
    context_BTD: Tensor  # zeros where an utterance is padded
    packed_hidden: list[Tensor]  # [N, D]: the input of the first block, then the output of each block
    packing: Packing

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states with their padding, [B, T, D] each."""
        return [self.packing.unpack(x_ND) for x_ND in self.packed_hidden]


def valid_mask(lengths_B: Tensor, steps: int) -> Tensor:
    """[B, steps] bool: True inside each utterance."""
    return torch.arange(steps, device=lengths_B.device) < lengths_B.unsqueeze(1)


class Wav2Vec2Encoder(nn.Module):
    """Feature encoder, projection and transformer."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.config = config
        self.input_dropout = regularization.input_dropout
        self.feature_grad_mult = regularization.feature_grad_mult
        channels = config.conv_layers[-1][0]
        self.feature_encoder = FeatureEncoder(config)
        self.feature_norm = LayerNorm(channels)
        self.feature_projection = Linear(channels, config.dim)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim))
        self.transformer = TransformerEncoder(config, regularization)
        self.reset_parameters()
        if self.feature_grad_mult == 0.0:
            self.feature_encoder.requires_grad_(False)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.mask_embedding)

    def forward(
        self,
        waveforms_BS: Tensor,
        lengths: Lengths | None = None,
        mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
        active: Sequence[bool] | None = None,
        statistics: Statistics | None = None,
    ) -> EncoderOutput:
        """Encode waveforms.

        Args:
            lengths: of the utterances; None where none is padded.
            mask_BT: frames that are replaced by the mask embedding.
            channel_mask_BD: channels of the transformer's input that are zeroed in all frames.
            active: which blocks are computed (LayerDrop, Fan et al. 2019); default: all.
            statistics: of GroupNorm, where the waveforms are parts of longer ones (`FeatureEncoder.statistics`).

        Raises:
            ValueError: the waveforms have more frames than the model takes.
        """
        config = self.config
        samples_B = None if lengths is None else lengths.samples_B
        features_BTC = self.feature_encoder(waveforms_BS, samples_B, statistics)
        if config.max_frames is not None and features_BTC.shape[1] > config.max_frames:
            raise ValueError(f"{features_BTC.shape[1]} frames: the model takes at most {config.max_frames}")
        if features_BTC.requires_grad and self.feature_grad_mult != 1.0:
            features_BTC.register_hook(lambda gradient: gradient * self.feature_grad_mult)
        normalised_BTC = self.feature_norm(features_BTC)
        projected_BTD = self.feature_projection(normalised_BTC)
        x_BTD = dropout(projected_BTD, self.input_dropout, self.training)
        if mask_BT is not None:
            x_BTD = torch.where(mask_BT.unsqueeze(2), self.mask_embedding.to(x_BTD.dtype), x_BTD)
        if channel_mask_BD is not None:
            x_BTD = x_BTD.masked_fill(channel_mask_BD.unsqueeze(1), 0.0)
        context_BTD, hidden, packing = self.transformer(x_BTD, lengths, active)
        return EncoderOutput(features_BTC, normalised_BTC, projected_BTD, context_BTD, hidden, packing)


# ---------------------------------------------------------------- feature encoder


class FeatureEncoder(nn.Module):
    """Strided convolutions: a waveform to one feature vector per 20 ms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvLayer(config, index) for index in range(len(config.conv_layers)))

    def forward(self, waveforms_BS: Tensor, lengths_B: Tensor | None, statistics: Statistics | None = None) -> Tensor:
        """Features [B, T, C]; `lengths_B` in samples. `statistics` of GroupNorm, where not those of these waveforms."""
        x_BTC = waveforms_BS.unsqueeze(2)
        first, *others = self.layers
        x_BTC, lengths_B = first(x_BTC, lengths_B, statistics)
        for layer in others:
            x_BTC, lengths_B = layer(x_BTC, lengths_B)
        return x_BTC

    def statistics(self, blocks: Iterable[Tensor]) -> Statistics:
        """GroupNorm's statistics [1, G] of one waveform, given in blocks [S], so that its parts can be encoded apart.

        Blocks may be of any length; memory is needed for one of them.
        """
        layer = self.layers[0]
        assert isinstance(layer, ConvLayer)
        held_S = silence_S = layer.weight.new_zeros(layer.padding)
        frames, sums_1G, squares_1G = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for block_S in chain(blocks, [silence_S]):
            held_S = torch.cat([held_S, block_S.to(held_S)])
            more = (len(held_S) - layer.kernel) // layer.stride + 1
            if more > 0:
                mean_1G, variance_1G = layer.statistics(held_S.view(1, -1, 1))
                frames += more
                sums_1G = sums_1G + more * mean_1G.double()
                squares_1G = squares_1G + more * (variance_1G.double() + mean_1G.double().square())
                held_S = held_S[more * layer.stride :]
        mean_1G = sums_1G / frames
        return mean_1G, squares_1G / frames - mean_1G.square()


class ConvLayer(nn.Module):
    """Convolution; LayerNorm or, in the first layer, GroupNorm where the model has them; GELU."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        channels, self.kernel, self.stride = config.conv_layers[index]
        inputs = config.conv_layers[index - 1][0] if index else 1
        self.padding = conv_padding(self.kernel, config)
        next_layer = config.conv_layers[index + 1 : index + 2]
        self.next_is_padded = any(conv_padding(kernel, config) for _, kernel, _ in next_layer)
        self.weight = nn.Parameter(torch.empty(channels, inputs, self.kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if config.conv_bias else None
        self.norm: nn.Module | None = None
        if config.conv_norm == "layer":
            self.norm = LayerNorm(channels)
        elif index == 0:
            self.norm = GroupNorm(config.conv_norm_groups, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.weight[0].numel())  # as nn.Conv1d does
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x_BTC: Tensor, lengths_B: Tensor | None, statistics: Statistics | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output and its valid frames, from its input and that input's valid frames."""
        if self.padding:
            x_BTC = F.pad(x_BTC, (0, 0, self.padding, self.padding))
        valid_BT = None
        if lengths_B is not None:
            lengths_B = (lengths_B + (2 * self.padding - self.kernel)).div(self.stride, rounding_mode="floor") + 1
            valid_BT = valid_mask(lengths_B, (x_BTC.shape[1] - self.kernel) // self.stride + 1)
        if isinstance(self.norm, nn.GroupNorm):
            x_BTC = self.norm(x_BTC, valid_BT, self.weight, self.bias, stride=self.stride, statistics=statistics)
        else:
            x_BTC = strided_convolution(x_BTC, self.weight, self.bias, self.stride)
            if self.norm is not None:
                x_BTC = self.norm(x_BTC)
        x_BTC = F.gelu(x_BTC)
        if valid_BT is not None and self.next_is_padded:
            # The next layer's padding must meet silence where the utterance ends, as it does alone.
            x_BTC = x_BTC * valid_BT.unsqueeze(2)
        return x_BTC, lengths_B

    def statistics(self, x_BTC: Tensor) -> Statistics:
        """GroupNorm's statistics for an input without padded utterances that has the convolution's padding already."""
        assert isinstance(self.norm, nn.GroupNorm)
        return convolution_statistics(x_BTC, self.weight, self.bias, stride=self.stride, groups=self.norm.num_groups)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a convolution, see `normalized_convolution`. A module, so that ZeRO-3 sees that it is used."""

    def forward(  # type: ignore[override]
        self,
        x_BTI: Tensor,
        valid_BT: Tensor | None,
        weight_OIK: Tensor,
        bias_O: Tensor | None,
        *,
        stride: int,
        statistics: Statistics | None = None,
    ) -> Tensor:
        return normalized_convolution(
            x_BTI, valid_BT, weight_OIK, bias_O, self.weight, self.bias,
            stride=stride, groups=self.num_groups, eps=self.eps, statistics=statistics,
        )  # fmt: skip


@replaceable
def strided_convolution(x_BTI: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, stride: int) -> Tensor:
    """Convolution over time without padding: [B, (T - K) // stride + 1, O]."""
    return _convolution(x_BTI, weight_OIK, bias_O, stride=stride)


@replaceable
def normalized_convolution(
    x_BTI: Tensor,
    valid_BT: Tensor | None,
    weight_OIK: Tensor,
    bias_O: Tensor | None,
    scale_O: Tensor,
    shift_O: Tensor,
    *,
    stride: int,
    groups: int,
    eps: float,
    statistics: Statistics | None = None,
) -> Tensor:
    """GroupNorm (Wu & He 2018) of a strided convolution, over the valid frames of each utterance: [B, T, O].

    `valid_BT` describes the output, whose other frames are zero. `statistics` default to those of the output. Computed
    in fp32 and rounded to the type of `x_BTI`.
    """
    with without_autocast(x_BTI):
        y_BTO = strided_convolution(widen(x_BTI), weight_OIK, bias_O, stride)
        mean_BG, variance_BG = statistics or group_statistics(y_BTO, valid_BT, groups)
        deviation_BG = (variance_BG + eps).sqrt()
        y_BTGN = y_BTO.unflatten(2, (groups, -1))
        y_BTGN = (y_BTGN - _over_frames(mean_BG.to(y_BTO))) / _over_frames(deviation_BG.to(y_BTO))
        y_BTO = y_BTGN.flatten(2) * scale_O + shift_O
        if valid_BT is not None:
            y_BTO = y_BTO * valid_BT.unsqueeze(2)
        return y_BTO.to(x_BTI.dtype)


@replaceable
def convolution_statistics(
    x_BTI: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, *, stride: int, groups: int
) -> Statistics:
    """`group_statistics` of a strided convolution, where no utterance is padded."""
    return group_statistics(strided_convolution(widen(x_BTI), weight_OIK, bias_O, stride), None, groups)


def group_statistics(y_BTC: Tensor, valid_BT: Tensor | None, groups: int) -> Statistics:
    """Mean and variance [B, G] over each utterance's valid frames and a group's channels."""
    y_BTGN = y_BTC.unflatten(2, (groups, -1))
    if valid_BT is None:
        valid_BT = y_BTC.new_ones(y_BTC.shape[:2], dtype=torch.bool)
    count_B1 = valid_BT.sum(dim=1, keepdim=True) * y_BTGN.shape[3]
    mean_BG = (y_BTGN * valid_BT[:, :, None, None]).sum(dim=(1, 3)) / count_B1
    centred_BTGN = (y_BTGN - _over_frames(mean_BG)) * valid_BT[:, :, None, None]
    return mean_BG, centred_BTGN.square().sum(dim=(1, 3)) / count_B1


def _over_frames(x_BG: Tensor) -> Tensor:
    return x_BG[:, None, :, None]


# ---------------------------------------------------------------- transformer


class TransformerEncoder(nn.Module):
    """Convolutional positions, then pre- or post-LN blocks: projected features to context."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.dropout = regularization.dropout
        self.positional = PositionalConvolution(config)
        self.embedding_norm = LayerNorm(config.dim) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, regularization) for _ in range(config.layers))
        self.final_norm = LayerNorm(config.dim) if config.norm_first else None

    def forward(
        self, x_BTD: Tensor, lengths: Lengths | None, active: Sequence[bool] | None = None
    ) -> tuple[Tensor, list[Tensor], Packing]:
        """Context [B, T, D]; the packed hidden states: the first block's input, then the output of each block.

        A block whose `active` is False is skipped: it costs nothing and gets no gradient.
        """
        if lengths is not None:
            x_BTD = x_BTD * valid_mask(lengths.frames_B, x_BTD.shape[1]).unsqueeze(2)
        packing = Packing.of(x_BTD, lengths)
        x_ND = packing.pack(x_BTD) + packing.pack(self.positional(x_BTD))
        if self.embedding_norm is not None:
            x_ND = self.embedding_norm(x_ND)
        x_ND = dropout(x_ND, self.dropout, self.training)
        hidden = [x_ND]
        for index, block in enumerate(self.blocks):
            if active is None or active[index]:
                x_ND = block(x_ND, packing)
            hidden.append(x_ND)
        if self.final_norm is not None:
            x_ND = self.final_norm(x_ND)
        return packing.unpack(x_ND), hidden, packing


class PositionalConvolution(nn.Module):
    """A grouped, weight-normalised convolution and GELU: relative positions.

    Weight norm (Salimans & Kingma 2016) over all but the kernel's steps (dim=2 in fairseq), in fp32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel = config.positional_kernel
        self.groups = config.positional_groups
        self.direction = nn.Parameter(torch.empty(config.dim, config.dim // self.groups, self.kernel))
        self.magnitude = nn.Parameter(torch.empty(1, 1, self.kernel))
        self.bias = nn.Parameter(torch.empty(config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.direction, std=math.sqrt(4.0 / (self.kernel * self.direction.shape[0])))
        nn.init.zeros_(self.bias)
        if self.direction.is_meta:  # it has no values; see also `models.initialisation.NoDraws`
            return
        with torch.no_grad():
            self.magnitude.copy_(self.direction.norm(dim=(0, 1), keepdim=True))

    def forward(self, x_BTD: Tensor) -> Tensor:
        direction = widen(self.direction)
        weight = direction * (widen(self.magnitude) / direction.norm(dim=(0, 1), keepdim=True))
        return F.gelu(positional_convolution(x_BTD, weight, self.bias, self.groups))


@replaceable
def positional_convolution(x_BTD: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """Grouped convolution with `K // 2` zeros on both sides; the first T frames of its output."""
    y_BTD = _convolution(x_BTD, weight_DIK, bias_D, padding=weight_DIK.shape[2] // 2, groups=groups)
    return y_BTD[:, : x_BTD.shape[1]]


def _convolution(x_BTI: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, **settings: int) -> Tensor:
    """`F.conv1d` with channels last, in fp32, rounded to the type of `x_BTI`.

    In bf16 PyTorch's own are wrong on some CPUs (PyTorch 2.13): with groups where the processor has AMX (fewer than 16
    channels per group, kernels of 16 or longer), and gradients that are summed in bf16 where it has no bf16.
    """
    with without_autocast(x_BTI):
        bias_O = None if bias_O is None else widen(bias_O)
        y_BOT = F.conv1d(widen(x_BTI).transpose(1, 2), widen(weight_OIK), bias_O, **settings)
        return y_BOT.transpose(1, 2).to(x_BTI.dtype)


class Block(nn.Module):
    """Self-attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = regularization.dropout
        self.attention = SelfAttention(config, regularization)
        self.attention_norm = LayerNorm(config.dim)
        self.feed_forward = FeedForward(config, regularization)
        self.feed_forward_norm = LayerNorm(config.dim)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        if self.norm_first:
            x_ND = x_ND + self._drop(self.attention(self.attention_norm(x_ND), packing))
            return x_ND + self._drop(self.feed_forward(self.feed_forward_norm(x_ND)))
        x_ND = self.attention_norm(x_ND + self._drop(self.attention(x_ND, packing)))
        return self.feed_forward_norm(x_ND + self._drop(self.feed_forward(x_ND)))

    def _drop(self, x_ND: Tensor) -> Tensor:
        return dropout(x_ND, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = regularization.attention_dropout
        self.qkv = Linear(config.dim, 3 * config.dim, init=normal_as_in_bert)
        self.out = Linear(config.dim, config.dim, init=normal_as_in_bert)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        q_NHE, k_NHE, v_NHE = self.qkv(x_ND).unflatten(1, (3, self.heads, -1)).unbind(1)
        y_NHE = attention(q_NHE, k_NHE, v_NHE, packing, self.dropout if self.training else 0.0)
        return self.out(y_NHE.flatten(1))


@replaceable
def attention(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float) -> Tensor:
    """Softmax attention within each utterance, with dropout of its weights: [N, H, E]."""
    q_BHTE, k_BHTE, v_BHTE = (packing.unpack(x_NHE).transpose(1, 2) for x_NHE in (q_NHE, k_NHE, v_NHE))
    valid_BT = packing.mask()
    mask = None if valid_BT is None else valid_BT[:, None, None]
    y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask, dropout_p=probability)
    return packing.pack(y_BHTE.transpose(1, 2))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.activation_dropout = regularization.activation_dropout
        self.intermediate = Linear(config.dim, config.ffn_dim, init=normal_as_in_bert)
        self.output = Linear(config.ffn_dim, config.dim, init=normal_as_in_bert)

    def forward(self, x_ND: Tensor) -> Tensor:
        hidden = dropout(F.gelu(self.intermediate(x_ND)), self.activation_dropout, self.training)
        return self.output(hidden)
