"""A model's tensors and settings as torchaudio's wav2vec 2.0 has them. torchaudio itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from w2vscale.config.tree import CtcConfig, ModelConfig
from w2vscale.interop.huggingface import to_huggingface

PARTS = {
    "wav2vec2.feature_extractor.": "feature_extractor.",
    "wav2vec2.feature_projection.": "encoder.feature_projection.",
    "wav2vec2.encoder.": "encoder.transformer.",
    "lm_head.": "aux.",
}
"""torchaudio's modules are named as Transformers', under other parents."""


def to_torchaudio(state: Mapping[str, Tensor], config: ModelConfig, ctc: CtcConfig) -> dict[str, Tensor]:
    """The `state_dict` of our model as that of `torchaudio.models.Wav2Vec2Model`: the encoder, and the output layer.

    Raises:
        UserError: torchaudio has no such model, or `state` is not one of `config`.
    """
    theirs = to_huggingface(state, config, ctc)
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in theirs.items()
        for old, new in PARTS.items()
        if name.startswith(old)
    }


def torchaudio_arguments(config: ModelConfig, ctc: CtcConfig) -> dict[str, Any]:
    """The arguments of `torchaudio.models.wav2vec2_model`."""
    return {
        "extractor_mode": f"{config.conv_norm}_norm",
        "extractor_conv_layer_config": [list(layer) for layer in config.conv_layers],
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.dim,
        "encoder_projection_dropout": config.input_dropout,
        "encoder_pos_conv_kernel": config.positional_kernel,
        "encoder_pos_conv_groups": config.positional_groups,
        "encoder_num_layers": config.layers,
        "encoder_num_heads": config.heads,
        "encoder_attention_dropout": config.attention_dropout,
        "encoder_ff_interm_features": config.ffn_dim,
        "encoder_ff_interm_dropout": config.activation_dropout,
        "encoder_dropout": config.dropout,
        "encoder_layer_norm_first": config.norm_first,
        "encoder_layer_drop": config.layerdrop,
        "aux_num_out": len(ctc.vocabulary) or None,
    }
