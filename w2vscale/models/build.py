"""The model that a run's settings describe."""

from __future__ import annotations

import torch

from w2vscale.config.tree import CtcConfig, ModelConfig
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.objectives.ctc import Wav2Vec2ForCTC

Wav2Vec2 = Wav2Vec2ForPretraining | Wav2Vec2ForCTC


def build_model(config: ModelConfig, ctc: CtcConfig, compute_dtype: torch.dtype = torch.float32) -> Wav2Vec2:
    """A fine-tuning model where there is a vocabulary, otherwise a pretraining model."""
    if ctc.vocabulary:
        return Wav2Vec2ForCTC(config, ctc, compute_dtype)
    return Wav2Vec2ForPretraining(config, compute_dtype)


def parameter_shapes(config: ModelConfig, ctc: CtcConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, which takes no memory for it."""
    with torch.device("meta"):
        model = build_model(config, ctc)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
