"""wav2vec 2.0's pretraining model: the encoder, the quantizer and the loss of masked contrastive prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import ModelConfig
from w2vscale.data.inputs import PretrainingInputs
from w2vscale.models.layers import Linear, dropout
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder, valid_mask
from w2vscale.objectives.contrastive import contrastive_logits, contrastive_loss
from w2vscale.objectives.quantizer import Quantizer, code_ids, diversity_loss


class LossSums(NamedTuple):
    """Sums over masked frames; divide by an update's global number of masked frames.

    `total` is what is differentiated: contrastive + weighted diversity and feature penalty. The rest is detached.
    """

    total: Tensor
    contrastive: Tensor  # nats
    diversity: Tensor  # of each micro-batch, times its masked frames
    feature_penalty: Tensor  # mean square of the features of each micro-batch, times its masked frames
    correct: Tensor
    masked: Tensor
    code_counts_GV: Tensor
    probability_sums_GV: Tensor

    def plus(self, other: LossSums) -> LossSums:
        """Sums over both."""
        return LossSums(*(a + b for a, b in zip(self, other, strict=True)))


class Wav2Vec2ForPretraining(nn.Module):
    """The encoder, the quantizer and the loss of masked contrastive prediction.

    `compute_dtype` is the type of activations and matrix products; statistics, similarities, Gumbel softmax and
    losses are fp32 whatever it is.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        channels = config.dim if config.quantizer_input == "projected" else config.conv_layers[-1][0]
        self.encoder = Wav2Vec2Encoder(config, config)
        self.quantizer = Quantizer(config, channels)
        self.context_projection = Linear(config.dim, config.projection_dim)
        self.target_projection = (
            Linear(config.codevector_dim, config.projection_dim) if config.target_projection else nn.Identity()
        )

    def forward(
        self,
        inputs: PretrainingInputs,
        *,
        noise_MGV: Tensor | None = None,
        temperature: float = 1.0,
        active: Sequence[bool] | None = None,
    ) -> LossSums:
        """Loss sums of the micro-batches in `inputs`; without Gumbel noise the quantizer takes the argmax."""
        config = self.config
        lengths_B, frames_B = (inputs.lengths_B, inputs.frames_B) if inputs.padded else (None, None)
        waveforms_BS = inputs.waveforms_BS.to(self.compute_dtype)
        encoded = self.encoder(waveforms_BS, lengths_B, frames_B, inputs.mask_BT, active=active)

        targets_BTC = encoded.projected_BTD if config.quantizer_input == "projected" else encoded.normalised_BTC
        targets_MC = targets_BTC[inputs.utterance_M, inputs.frame_M]
        targets_MC = dropout(targets_MC, config.feature_dropout, self.training)
        quantized = self.quantizer(targets_MC, noise_MGV, temperature)
        logits_MK = contrastive_logits(
            self.context_projection(encoded.context_BTD[inputs.utterance_M, inputs.frame_M]),
            self.target_projection(quantized.vectors_MD),
            code_ids(quantized.codes_MG, config.codebook_entries),
            utterance_M=inputs.utterance_M,
            slot_M=inputs.slot_M,
            negatives_MK=inputs.negatives_MK,
            utterances=inputs.waveforms_BS.shape[0],
            slots=inputs.slots,
            temperature=config.logit_temperature,
        )
        contrastive, correct = contrastive_loss(logits_MK)
        probabilities_MGV = quantized.logits_MGV.softmax(dim=2)
        diversity = _diversity_sum(probabilities_MGV, inputs.masked)
        penalty = _feature_penalty_sum(encoded.features_BTC, frames_B, inputs)
        total = contrastive + config.diversity_weight * diversity + config.feature_penalty_weight * penalty
        codes_GVM = F.one_hot(quantized.codes_MG, config.codebook_entries)
        return LossSums(
            total=total,
            contrastive=contrastive.detach(),
            diversity=diversity.detach(),
            feature_penalty=penalty.detach(),
            correct=correct.float(),
            masked=torch.full_like(contrastive.detach(), float(sum(inputs.masked))),
            code_counts_GV=codes_GVM.sum(dim=0).float(),
            probability_sums_GV=probabilities_MGV.detach().sum(dim=0),
        )


def _diversity_sum(probabilities_MGV: Tensor, masked: Sequence[int]) -> Tensor:
    """Each micro-batch's diversity loss times its masked frames."""
    parts = [
        diversity_loss(part_MGV.mean(dim=0)) * part_MGV.shape[0]
        for part_MGV in probabilities_MGV.split(list(masked))
        if part_MGV.shape[0]
    ]
    return torch.stack(parts).sum() if parts else probabilities_MGV.sum()


def _feature_penalty_sum(features_BTC: Tensor, frames_B: Tensor | None, inputs: PretrainingInputs) -> Tensor:
    """Each micro-batch's mean square of valid features (before LayerNorm) times its masked frames."""
    square_BT = features_BTC.float().square().mean(dim=2)
    if frames_B is not None:
        square_BT = square_BT * valid_mask(frames_B, square_BT.shape[1])
    sums = [part_BT.sum() for part_BT in square_BT.split(list(inputs.utterances))]
    frames = [part_B.sum() for part_B in inputs.frames_B.split(list(inputs.utterances))]
    weighted = [s / n * m for s, n, m in zip(sums, frames, inputs.masked, strict=True)]
    return torch.stack(weighted).sum()
