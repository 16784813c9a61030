"""wav2vec 2.0: the encoder, and the encoder with its pretraining objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from w2vscale.config import ModelConfig, RegularizationConfig
from w2vscale.models.feature_encoder import FeatureEncoder, scale_gradient
from w2vscale.models.layers import LayerNorm, Linear, dropout
from w2vscale.models.transformer import TransformerEncoder


class EncoderOutput(NamedTuple):
    """What the encoder computes of B utterances with T frames."""

    features_BTC: Tensor  # of the feature encoder, before its LayerNorm
    normalised_BTC: Tensor  # features after their LayerNorm; never masked
    projected_BTD: Tensor  # normalised features after the projection; never masked
    context_BTD: Tensor
    hidden: list[Tensor]  # the blocks' input, then each block's output


class Wav2Vec2Encoder(nn.Module):
    """Feature encoder, projection and transformer."""

    def __init__(self, config: ModelConfig, regularization: RegularizationConfig) -> None:
        super().__init__()
        self.config = config
        self.regularization = regularization
        channels = config.conv_layers[-1][0]
        self.feature_encoder = FeatureEncoder(config)
        if regularization.feature_grad_mult == 0.0:
            self.feature_encoder.requires_grad_(False)
        self.feature_norm = LayerNorm(channels)
        self.feature_projection = Linear(channels, config.dim)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim))
        self.transformer = TransformerEncoder(config, regularization)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.mask_embedding)

    def forward(
        self,
        waveforms_BS: Tensor,
        lengths_B: Tensor | None = None,
        frames_B: Tensor | None = None,
        mask_BT: Tensor | None = None,
        channel_mask_BD: Tensor | None = None,
        active: Sequence[bool] | None = None,
        moments_BJJ: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode waveforms; `lengths_B` (samples) and `frames_B` are None where no utterance is padded.

        `moments_BJJ`: of the first layer's taps, where the waveforms are parts of longer ones.
        """
        config = self.config
        features_BTC = self.feature_encoder(waveforms_BS, lengths_B, moments_BJJ)
        if config.max_frames is not None and features_BTC.shape[1] > config.max_frames:
            raise ValueError(f"{features_BTC.shape[1]} frames: the model takes at most {config.max_frames}")
        if features_BTC.requires_grad:
            features_BTC = scale_gradient(features_BTC, self.regularization.feature_grad_mult)
        normalised_BTC = self.feature_norm(features_BTC)
        projected_BTD = self.feature_projection(normalised_BTC)
        x_BTD = dropout(projected_BTD, self.regularization.input_dropout, self.training)
        if mask_BT is not None:
            x_BTD = torch.where(mask_BT.unsqueeze(2), self.mask_embedding.to(x_BTD.dtype), x_BTD)
        if channel_mask_BD is not None:
            x_BTD = x_BTD.masked_fill(channel_mask_BD.unsqueeze(1), 0.0)
        context_BTD, hidden = self.transformer(x_BTD, frames_B, active)
        return EncoderOutput(features_BTC, normalised_BTC, projected_BTD, context_BTD, hidden)
