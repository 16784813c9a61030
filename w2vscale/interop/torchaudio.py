"""Convert weights and settings to the wav2vec 2.0 of torchaudio, which need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.config import Config
from w2vscale.interop.huggingface import PREFIX, to_huggingface
from w2vscale.objectives import build_objective

PARTS = {
    "feature_extractor.": "feature_extractor.",
    "feature_projection.": "encoder.feature_projection.",
    "encoder.": "encoder.transformer.",
    "lm_head.": "aux.",
}
"""Transformers prefix: torchaudio prefix. The rest of each name is the same."""


def to_torchaudio(state: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """Convert our `state_dict` to that of `torchaudio.models.Wav2Vec2Model`: the encoder and the CTC output layer.

    Raises UserError if torchaudio has no such model, or `state` does not fit `config`.
    """
    theirs = {name.removeprefix(PREFIX): tensor for name, tensor in to_huggingface(state, config).items()}
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in theirs.items()
        for old, new in PARTS.items()
        if name.startswith(old)
    }


def torchaudio_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `torchaudio.models.wav2vec2_model`."""
    model, regularization = config.model, config.regularization
    return {
        "extractor_mode": f"{model.conv_norm}_norm",
        "extractor_conv_layer_config": [list(layer) for layer in model.conv_layers],
        "extractor_conv_bias": model.conv_bias,
        "encoder_embed_dim": model.dim,
        "encoder_projection_dropout": regularization.input_dropout,
        "encoder_pos_conv_kernel": model.positional_kernel,
        "encoder_pos_conv_groups": model.positional_groups,
        "encoder_num_layers": model.layers,
        "encoder_num_heads": model.heads,
        "encoder_attention_dropout": regularization.attention_dropout,
        "encoder_ff_interm_features": model.ffn_dim,
        "encoder_ff_interm_dropout": regularization.activation_dropout,
        "encoder_dropout": regularization.dropout,
        "encoder_layer_norm_first": model.norm_first,
        "encoder_layer_drop": regularization.layerdrop,
        "aux_num_out": len(build_objective(config).vocabulary) or None,
    }
