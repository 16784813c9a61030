"""Write the asset card that tells fairseq2 what a model is, where its file is, and which tokenizer it has."""

from __future__ import annotations

import re
from typing import Any

from w2vscale.config import Config
from w2vscale.config.yaml_1_2 import dump_yaml
from w2vscale.objectives import build_objective

MODEL = "model.pt"


def asset_card(config: Config, *, name: str, tokenizer: str | None) -> str:
    """Return the card of `MODEL` beside it, with all settings of the model, and the card of its `tokenizer`, if any.

    `name` is that of the run; characters that should not be in a name become underscores. fairseq2 finds files from the
    folder of the card. The settings are complete, because the versions of fairseq2 know other architectures by name.
    """
    name = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_") or "model"
    ctc = bool(build_objective(config).vocabulary)
    card = {
        "name": name,
        "model_family": "wav2vec2_asr" if ctc else "wav2vec2",
        "model_config": {"encoder_config": _encoder(config), **(_ctc(config) if ctc else _pretraining(config))},
        "checkpoint": MODEL,
    }
    if tokenizer is None:
        return _yaml(card)
    card["tokenizer_ref"] = f"{name}_tokenizer"
    other = {"name": card["tokenizer_ref"], "tokenizer_family": "char_tokenizer", "tokenizer": tokenizer}
    return f"{_yaml(card)}---\n{_yaml(other)}"


def _encoder(config: Config) -> dict[str, Any]:
    model, regularization = config.model, config.regularization
    return {
        "model_dim": model.dim,
        "feature_dim": model.conv_layers[-1][0],
        "feature_extractor_layer_descs": [list(layer) for layer in model.conv_layers],
        "feature_extractor_bias": model.conv_bias,
        "feature_extractor_layer_norm_convs": model.conv_norm == "layer",
        "feature_grad_scale": regularization.feature_grad_mult or 1.0,  # fairseq2 freezes by another setting
        "layer_norm_features": model.embedding_norm,
        "first_pass_dropout_p": regularization.input_dropout,
        "pos_conv_kernel_size": model.positional_kernel,
        "num_pos_conv_groups": model.positional_groups,
        "num_encoder_layers": model.layers,
        "num_encoder_attn_heads": model.heads,
        "ffn_inner_dim": model.ffn_dim,
        "norm_order": "PRE" if model.norm_first else "POST",
        "dropout_p": regularization.dropout,
        "attn_dropout_p": regularization.attention_dropout,
        "ffn_inner_dropout_p": regularization.activation_dropout,
        "layer_drop_p": regularization.layerdrop,
    }


def _pretraining(config: Config) -> dict[str, Any]:
    settings: Any = build_objective(config).settings
    return {
        "final_dim": settings.projection_dim,
        "quantized_dim": settings.codevector_dim,
        "num_codebooks": settings.codebooks,
        "num_codebook_entries": settings.codebook_entries,
        "codebook_sampling_temperature": [settings.gumbel_start, settings.gumbel_end, settings.gumbel_decay],
        "num_distractors": settings.negatives,
        "logit_temp": settings.logit_temperature,
        **_masks(settings),
    }


def _ctc(config: Config) -> dict[str, Any]:
    objective = build_objective(config)
    settings: Any = objective.settings
    return {
        "target_vocab_size": len(objective.vocabulary),
        "final_dropout_p": settings.final_dropout,
        "use_masking": True,
        "spatial_mask_span_len": settings.channel_mask_length,
        "max_spatial_mask_prob": settings.channel_mask_probability,
        **_masks(settings),
    }


def _masks(settings: Any) -> dict[str, Any]:
    return {
        "temporal_mask_span_len": settings.mask_length,
        "max_temporal_mask_prob": settings.mask_probability,
        "min_num_temporal_mask_spans": settings.mask_min_spans,
    }


def _yaml(card: dict[str, Any]) -> str:
    return dump_yaml(card, sort_keys=False, default_flow_style=None, width=100)
