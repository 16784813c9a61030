"""Weights and settings of a pretraining model in the format of Hugging Face Transformers, both ways.

Maps between our `Wav2Vec2ForPretraining` and Transformers' `Wav2Vec2ForPreTraining` (5.x). Names and shapes only:
Transformers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from w2vscale.config.tree import ModelConfig
from w2vscale.errors import UserError

POSITIONAL = "wav2vec2.encoder.pos_conv_embed.conv"
# What PyTorch's older weight norm called its tensors, as in checkpoints published before 2023.
LEGACY_NAMES = {
    f"{POSITIONAL}.weight_g": f"{POSITIONAL}.parametrizations.weight.original0",
    f"{POSITIONAL}.weight_v": f"{POSITIONAL}.parametrizations.weight.original1",
}


def to_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The `state_dict` of our model as that of Transformers' model; values and types unchanged.

    Raises:
        UserError: Transformers has no such model, or `state` is not one of `config`.
    """
    _refuse_unrepresentable(config)
    names = _names(config)
    _check_names(state, set(names), what="weights")
    theirs: dict[str, Tensor] = {}
    for name, parts in names.items():
        if len(parts) == 1:
            theirs[parts[0]] = state[name]
        else:
            # Copies, because safetensors refuses tensors that share memory.
            theirs.update(zip(parts, (part.clone() for part in state[name].chunk(len(parts))), strict=True))
    theirs["quantizer.codevectors"] = theirs["quantizer.codevectors"].flatten(0, 1).unsqueeze(0)
    return theirs


def from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The `state_dict` of Transformers' model as that of our model; the exact inverse of `to_huggingface`.

    Raises:
        UserError: Transformers has no such model, or `state` is not one of `config`.
    """
    _refuse_unrepresentable(config)
    names = _names(config)
    state = {LEGACY_NAMES.get(name, name): tensor for name, tensor in state.items()}
    _check_names(state, {part for parts in names.values() for part in parts}, what="Hugging Face weights")
    ours = {
        name: state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        for name, parts in names.items()
    }
    codebooks, entries = config.codebooks, config.codebook_entries
    flat = ours["quantizer.codevectors"]
    if flat.shape != (1, codebooks * entries, config.codevector_dim // codebooks):
        raise UserError(
            f"Hugging Face weights: quantizer.codevectors has shape {tuple(flat.shape)}, which does not fit "
            f"model.codebooks={codebooks}, model.codebook_entries={entries}, "
            f"model.codevector_dim={config.codevector_dim}"
        )
    ours["quantizer.codevectors"] = flat.view(codebooks, entries, -1)
    return ours


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json`. Whatever Transformers' default differs from pretraining in is written out.

    Raises:
        UserError: Transformers has no such model.
    """
    _refuse_unrepresentable(config)
    return {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForPreTraining"],
        "conv_dim": [channels for channels, _, _ in config.conv_layers],
        "conv_kernel": [kernel for _, kernel, _ in config.conv_layers],
        "conv_stride": [stride for _, _, stride in config.conv_layers],
        "conv_bias": config.conv_bias,
        "feat_extract_norm": config.conv_norm,
        "feat_extract_activation": "gelu",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "do_stable_layer_norm": config.norm_first,
        "num_conv_pos_embeddings": config.positional_kernel,
        "num_conv_pos_embedding_groups": config.positional_groups,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "feat_proj_dropout": config.input_dropout,
        "feat_quantizer_dropout": config.feature_dropout,
        "layerdrop": config.layerdrop,
        "num_codevector_groups": config.codebooks,
        "num_codevectors_per_group": config.codebook_entries,
        "codevector_dim": config.codevector_dim,
        "proj_codevector_dim": config.projection_dim,
        "apply_spec_augment": True,
        "mask_time_prob": config.mask_probability,
        "mask_time_length": config.mask_length,
        "mask_time_min_masks": config.mask_min_spans,
        "mask_feature_prob": 0.0,
        "num_negatives": config.negatives,
        "contrastive_logits_temperature": config.logit_temperature,
        "diversity_loss_weight": config.diversity_weight,
    }


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of `preprocessor_config.json`: how audio was treated in training."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "processor_class": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # Transformers' GroupNorm counts padding; models that have it were trained, and are used, without a mask.
        "return_attention_mask": config.conv_norm == "layer",
        "sampling_rate": config.sampling_rate,
    }


def model_config(document: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    """The settings of a model from its `config.json` and `preprocessor_config.json`; the inverse of the above.

    What Transformers' files do not say (the Gumbel softmax' schedule, gradient scale and feature penalty) is as in the
    published recipe for such a model.

    Raises:
        UserError: it is not a wav2vec 2.0 that w2vscale has.
    """
    if document.get("model_type") != "wav2vec2":
        raise UserError(f"config.json: model_type={document.get('model_type')!r}: only wav2vec2 can be imported")
    values = {**HUGGINGFACE_DEFAULTS, **document}
    for key, wanted in (("feat_extract_activation", "gelu"), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-5)):
        if values[key] != wanted:
            raise UserError(f"config.json: {key}={values[key]!r}: w2vscale has {wanted!r} only")
    if values["add_adapter"]:
        raise UserError("config.json: add_adapter=true: w2vscale has no adapters")
    norm_first = values["do_stable_layer_norm"]
    channels = values["conv_dim"][0]
    is_base = values["hidden_size"] <= 768 and not norm_first
    try:
        return ModelConfig.model_validate(
            {
                "sampling_rate": preprocessor.get("sampling_rate", 16_000),
                "normalize_waveform": preprocessor.get("do_normalize", True),
                "conv_layers": list(zip(values["conv_dim"], values["conv_kernel"], values["conv_stride"], strict=True)),
                "conv_bias": values["conv_bias"],
                "conv_norm": values["feat_extract_norm"],
                "conv_norm_groups": channels,
                "dim": values["hidden_size"],
                "layers": values["num_hidden_layers"],
                "heads": values["num_attention_heads"],
                "ffn_dim": values["intermediate_size"],
                "norm_first": norm_first,
                "embedding_norm": not norm_first,
                "positional_kernel": values["num_conv_pos_embeddings"],
                "positional_groups": values["num_conv_pos_embedding_groups"],
                "dropout": values["hidden_dropout"],
                "attention_dropout": values["attention_dropout"],
                "activation_dropout": values["activation_dropout"],
                "input_dropout": values["feat_proj_dropout"],
                "feature_dropout": values["feat_quantizer_dropout"],
                "layerdrop": values["layerdrop"],
                "codebooks": values["num_codevector_groups"],
                "codebook_entries": values["num_codevectors_per_group"],
                "codevector_dim": values["codevector_dim"],
                "projection_dim": values["proj_codevector_dim"],
                "negatives": values["num_negatives"],
                "logit_temperature": values["contrastive_logits_temperature"],
                "diversity_weight": values["diversity_loss_weight"],
                "gumbel_end": 0.5 if is_base else 0.1,
                "feature_grad_mult": 1.0 if norm_first else 0.1 if is_base else 0.03,
                "feature_penalty_weight": 0.0 if norm_first else 10.0,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"config.json: {key}: {first['msg']}") from None


HUGGINGFACE_DEFAULTS: dict[str, Any] = {
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "do_stable_layer_norm": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.1,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "codevector_dim": 256,
    "proj_codevector_dim": 256,
    "num_negatives": 100,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
    "add_adapter": False,
}
"""What a config.json leaves out (transformers 5.23, `Wav2Vec2Config`)."""


def _refuse_unrepresentable(config: ModelConfig) -> None:
    """Raise on the first setting that Transformers' wav2vec 2.0 has no counterpart of."""
    channels = config.conv_layers[0][0]
    obstacles = {
        f"model.quantizer_input={config.quantizer_input}": config.quantizer_input != "features",
        "model.target_projection=false": not config.target_projection,
        "model.conv_padding=true": config.conv_padding,
        f"model.conv_norm_groups={config.conv_norm_groups} (with {channels} channels)": (
            config.conv_norm == "group" and config.conv_norm_groups != channels
        ),
        f"model.embedding_norm={str(config.embedding_norm).lower()} with "
        f"model.norm_first={str(config.norm_first).lower()}": config.embedding_norm == config.norm_first,
        f"model.max_frames={config.max_frames}": config.max_frames is not None,
    }
    for setting, present in obstacles.items():
        if present:
            raise UserError(
                f"{setting}: Hugging Face Transformers has no such wav2vec 2.0; "
                "only models of the published architectures can be converted"
            )


def _check_names(state: Mapping[str, Tensor], expected: set[str], *, what: str) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing:
        raise UserError(f"{what}: {missing[0]} is missing ({len(missing)} missing in all); do they fit the model?")
    if unknown:
        raise UserError(f"{what}: {unknown[0]} is unknown ({len(unknown)} unknown in all); do they fit the model?")


def _names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor, and its name in Transformers: several where ours is theirs, one below the other."""
    names: dict[str, tuple[str, ...]] = {
        "encoder.mask_embedding": ("wav2vec2.masked_spec_embed",),
        "encoder.transformer.positional.magnitude": (f"{POSITIONAL}.parametrizations.weight.original0",),
        "encoder.transformer.positional.direction": (f"{POSITIONAL}.parametrizations.weight.original1",),
        "encoder.transformer.positional.bias": (f"{POSITIONAL}.bias",),
        "quantizer.codevectors": ("quantizer.codevectors",),
    }

    def add_affine(ours: str, *theirs: str) -> None:
        names.update({f"{ours}.{leaf}": tuple(f"{name}.{leaf}" for name in theirs) for leaf in ("weight", "bias")})

    for index in range(len(config.conv_layers)):
        ours, theirs = f"encoder.feature_encoder.layers.{index}", f"wav2vec2.feature_extractor.conv_layers.{index}"
        names[f"{ours}.weight"] = (f"{theirs}.conv.weight",)
        if config.conv_bias:
            names[f"{ours}.bias"] = (f"{theirs}.conv.bias",)
        if config.conv_norm == "layer" or index == 0:
            add_affine(f"{ours}.norm", f"{theirs}.layer_norm")
    add_affine("encoder.feature_norm", "wav2vec2.feature_projection.layer_norm")
    add_affine("encoder.feature_projection", "wav2vec2.feature_projection.projection")
    # Transformers has one LayerNorm around the blocks: below them in post-LN models, above them in pre-LN models.
    norm = "final_norm" if config.norm_first else "embedding_norm"
    add_affine(f"encoder.transformer.{norm}", "wav2vec2.encoder.layer_norm")
    for index in range(config.layers):
        ours, theirs = f"encoder.transformer.blocks.{index}", f"wav2vec2.encoder.layers.{index}"
        add_affine(f"{ours}.attention.qkv", *(f"{theirs}.attention.{which}_proj" for which in "qkv"))
        add_affine(f"{ours}.attention.out", f"{theirs}.attention.out_proj")
        add_affine(f"{ours}.attention_norm", f"{theirs}.layer_norm")
        add_affine(f"{ours}.feed_forward.intermediate", f"{theirs}.feed_forward.intermediate_dense")
        add_affine(f"{ours}.feed_forward.output", f"{theirs}.feed_forward.output_dense")
        add_affine(f"{ours}.feed_forward_norm", f"{theirs}.final_layer_norm")
    add_affine("quantizer.projection", "quantizer.weight_proj")
    add_affine("context_projection", "project_hid")
    add_affine("target_projection", "project_q")
    return names
