"""wav2vec 2.0 with an output layer for text, trained by connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.tree import CtcConfig, ModelConfig
from w2vscale.data.inputs import CtcInputs
from w2vscale.models.layers import Linear, dropout
from w2vscale.models.wav2vec2 import BERT_STD, Wav2Vec2Encoder

BLANK = 0
"""The symbol of CTC's blank: a vocabulary's first."""


class CtcSums(NamedTuple):
    """Sums over labels; divide by an update's global number of them. `total` is what is differentiated."""

    total: Tensor  # nats
    labels: Tensor
    errors: Tensor  # insertions, deletions and substitutions of the greedy labels; 0 in training

    def plus(self, other: CtcSums) -> CtcSums:
        """Sums over both."""
        return CtcSums(*(a + b for a, b in zip(self, other, strict=True)))


class Wav2Vec2ForCTC(nn.Module):
    """The encoder, and logits of a vocabulary's symbols for every frame."""

    def __init__(self, config: ModelConfig, ctc: CtcConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.final_dropout = ctc.final_dropout
        self.compute_dtype = compute_dtype
        self.encoder = Wav2Vec2Encoder(config, config)
        self.head = Linear(config.dim, len(ctc.vocabulary), std=BERT_STD)

    def forward(self, inputs: CtcInputs, *, active: Sequence[bool] | None = None, frozen: bool = False) -> CtcSums:
        """Loss sums; with `frozen`, the head alone learns. In evaluation nothing is masked, and errors are counted."""
        lengths_B, frames_B = (inputs.lengths_B, inputs.frames_B) if inputs.padded else (None, None)
        masks = (inputs.mask_BT, inputs.channel_mask_BD) if self.training else (None, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = self.encoder(
                inputs.waveforms_BS.to(self.compute_dtype), lengths_B, frames_B, *masks, active=active
            )
        logits_BTV = self.head(dropout(encoded.context_BTD, self.final_dropout, self.training))
        total = ctc_loss(logits_BTV, inputs.frames_B, inputs.labels_L, inputs.label_lengths_B)
        errors = 0 if self.training else label_errors(logits_BTV, inputs)
        return CtcSums(
            total=total,
            labels=torch.full_like(total.detach(), sum(inputs.labels)),
            errors=torch.full_like(total.detach(), errors),
        )

    def logits(self, waveforms_BS: Tensor, lengths_B: Tensor | None = None, frames_B: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; `lengths_B` (samples) and `frames_B` are None where no utterance is padded."""
        encoded = self.encoder(waveforms_BS.to(self.compute_dtype), lengths_B, frames_B)
        logits_BTV: Tensor = self.head(encoded.context_BTD)
        return logits_BTV


def ctc_loss(logits_BTV: Tensor, frames_B: Tensor, labels_L: Tensor, label_lengths_B: Tensor) -> Tensor:
    """The sum over utterances of -log p(labels), in nats, fp32.

    `labels_L` are those of all utterances, one after another. An utterance with too few frames for its labels (and
    for blanks between equal ones), or without any, counts nothing.
    """
    log_probabilities_TBV = logits_BTV.float().log_softmax(dim=2).transpose(0, 1)
    losses_B = F.ctc_loss(
        log_probabilities_TBV, labels_L, frames_B, label_lengths_B, blank=BLANK, reduction="none", zero_infinity=True
    )
    return losses_B.masked_fill(label_lengths_B == 0, 0.0).sum()


def greedy_labels(logits_TV: Tensor) -> list[int]:
    """The most probable symbol of each frame, repetitions joined, blanks left out."""
    best = torch.unique_consecutive(logits_TV.argmax(dim=1)).tolist()
    return [symbol for symbol in best if symbol != BLANK]


def label_errors(logits_BTV: Tensor, inputs: CtcInputs) -> int:
    """Edit distance between the greedy labels and the given ones, over all utterances."""
    from rapidfuzz.distance import Levenshtein

    logits_BTV = logits_BTV.float().cpu()
    given = inputs.labels_L.cpu().split(inputs.label_lengths_B.tolist())
    rows = zip(logits_BTV, inputs.frames_B.tolist(), given, strict=True)
    return sum(
        int(Levenshtein.distance(greedy_labels(logits_TV[:frames]), labels.tolist()))
        for logits_TV, frames, labels in rows
    )
