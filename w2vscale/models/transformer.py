"""The context network: mask embedding, convolutional positions and transformer blocks, pre- or post-LN."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import ModelConfig, RegularizationConfig
from w2vscale.models.convolution import long_convolution
from w2vscale.models.feature_encoder import valid_mask
from w2vscale.models.layers import LayerNorm, Linear, dropout, unscaled_dropout
from w2vscale.models.products import widened

BERT_STD = 0.02
"""Of the initial weights of attention and feed-forward (Devlin et al. 2019)."""


class TransformerEncoder(nn.Module):
    """Contextualises projected features [B, T, D]."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.dropout = regularization.dropout
        self.heads = config.heads
        self.positional = PositionalConvolution(config)
        self.embedding_norm = LayerNorm(config.dim) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, regularization) for _ in range(config.layers))
        self.final_norm = LayerNorm(config.dim) if config.norm_first else None

    def forward(
        self, x_BTD: Tensor, frames_B: Tensor | None, active: Sequence[bool] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Context [B, T, D] and the hidden states: the blocks' input, then each block's output.

        `frames_B` are the valid frames, or None where no utterance is padded. `active[i]` says whether block i is
        computed (LayerDrop, Fan et al. 2019): a block that is not costs nothing.
        """
        attend = None
        if frames_B is not None:
            valid_BT = valid_mask(frames_B, x_BTD.shape[1])
            x_BTD = x_BTD * valid_BT.unsqueeze(2)
            if takes_segments(x_BTD, self.heads):
                attend = segment_bounds(frames_B, x_BTD.shape[1])
            else:
                attend = valid_BT.view(valid_BT.shape[0], 1, 1, -1)
        x_BTD = x_BTD + self.positional(x_BTD)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = dropout(x_BTD, self.dropout, self.training)
        hidden = [x_BTD]
        for index, block in enumerate(self.blocks):
            if active is None or active[index]:
                x_BTD = block(x_BTD, attend)
            hidden.append(x_BTD)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD, hidden


class PositionalConvolution(nn.Module):
    """A grouped, weight-normalised convolution as relative positional embedding.

    Weight norm is over all but the kernel's steps (Salimans & Kingma 2016; dim=2 as in fairseq), in fp32.
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
        with torch.no_grad():
            self.magnitude.copy_(self.direction.norm(dim=(0, 1), keepdim=True))
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        direction = self.direction.float()
        weight = direction * (self.magnitude.float() / direction.norm(dim=(0, 1), keepdim=True))
        return F.gelu(long_convolution(x_BTD, weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype), self.groups))


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

    def forward(self, x_BTD: Tensor, attend: Tensor | None) -> Tensor:
        if self.norm_first:
            x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), attend))
            return x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self._drop(self.attention(x_BTD, attend)))
        return self.feed_forward_norm(x_BTD + self._drop(self.feed_forward(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return dropout(x_BTD, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention; padded frames are never attended to."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = regularization.attention_dropout
        self.qkv = Linear(config.dim, 3 * config.dim, std=BERT_STD)
        self.out = Linear(config.dim, config.dim, std=BERT_STD)

    def forward(self, x_BTD: Tensor, attend: Tensor | None) -> Tensor:
        """`attend`: a mask [B, 1, 1, T] of valid frames, or `segment_bounds`; None where no utterance is padded."""
        batch, frames, dim = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, frames, 3, self.heads, dim // self.heads)
        probability = self.dropout if self.training else 0.0
        if attend is not None and attend.dtype == torch.int32:
            q_BTHE, k_BTHE, v_BTHE = qkv.unbind(2)
            y_BTHE = attention_in_segments(q_BTHE, k_BTHE, v_BTHE, attend, probability)
        else:
            q_BHTE, k_BHTE, v_BHTE = qkv.permute(2, 0, 3, 1, 4)
            y_BTHE = attention(q_BHTE, k_BHTE, v_BHTE, attend, probability).transpose(1, 2)
        return self.out(y_BTHE.reshape(batch, frames, dim))


def attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, attend: Tensor | None, probability: float) -> Tensor:
    """Scaled dot-product attention to what `attend` is True for, with dropout of its weights."""
    if probability == 0.0 or q_BHTE.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=attend, dropout_p=probability)
    # On CPUs PyTorch has no fused kernel with dropout; its fallback is this with its own dropout.
    dtype = q_BHTE.dtype
    q_BHTE, k_BHTE, v_BHTE = widened(q_BHTE), widened(k_BHTE), widened(v_BHTE)
    scores_BHTT = (q_BHTE * q_BHTE.shape[-1] ** -0.5) @ k_BHTE.transpose(2, 3)
    if attend is not None:
        never = torch.finfo(scores_BHTT.dtype).min
        scores_BHTT = scores_BHTT + torch.zeros_like(attend, dtype=scores_BHTT.dtype).masked_fill(~attend, never)
    weights_BHTT, factor = unscaled_dropout(scores_BHTT.softmax(dim=3), probability)
    return (weights_BHTT @ (v_BHTE * factor)).to(dtype)


def takes_segments(x_BTD: Tensor, heads: int) -> bool:
    """Whether FlashAttention can compute these inputs: bf16 on a GPU of compute capability 8 or higher."""
    size = x_BTD.shape[2] // heads
    return (
        x_BTD.device.type == "cuda"
        and x_BTD.dtype == torch.bfloat16
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(x_BTD.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def segment_bounds(frames_B: Tensor, steps: int) -> Tensor:
    """Where segments of a flattened batch [B x steps] begin and the last one ends, [2 B + 1] int32.

    Each utterance is a segment, and so is the padding behind it, which may be empty. Padded frames attend only to each
    other, so valid frames never see padding, and nothing needs to be packed.
    """
    starts_B = torch.arange(frames_B.shape[0], device=frames_B.device) * steps
    bounds = torch.stack([starts_B, starts_B + frames_B], dim=1).flatten()
    return F.pad(bounds, (0, 1), value=frames_B.shape[0] * steps).int()


def attention_in_segments(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, bounds: Tensor, probability: float) -> Tensor:
    """FlashAttention (Dao 2023, arXiv:2307.08691) within segments, with dropout: [B, T, H, E].

    With a mask PyTorch falls back to its memory-efficient kernel, which is slower (docs/performance.md).
    """
    steps = q_BTHE.shape[1]
    q_NHE, k_NHE, v_NHE = (x_BTHE.flatten(0, 1) for x_BTHE in (q_BTHE, k_BTHE, v_BTHE))
    # The operation that nested tensors call: the public functions for packed sequences have no dropout.
    y_NHE = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NHE, v_NHE, bounds, bounds, steps, steps, probability, False, False
    )[0]
    return y_NHE.view_as(q_BTHE)


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.activation_dropout = regularization.activation_dropout
        self.intermediate = Linear(config.dim, config.ffn_dim, std=BERT_STD)
        self.output = Linear(config.ffn_dim, config.dim, std=BERT_STD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = dropout(F.gelu(self.intermediate(x_BTD)), self.activation_dropout, self.training)
        return self.output(hidden)
