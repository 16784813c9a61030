"""Convert pretrained wav2vec 2.0 checkpoints of fairseq to our tensor names and settings.

Covers the names and settings in `models/wav2vec/wav2vec2.py` of all fairseq releases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from w2vscale.checkpoint.expected import expected_of
from w2vscale.config import Config, ObjectiveConfig
from w2vscale.config.tree import BASE_CONV_LAYERS
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import FairseqCheckpoint
from w2vscale.interop.names import PRETRAINING, by_section, to_ours
from w2vscale.optim.canonical import model_shapes

POSITIONAL = "encoder.pos_conv.0"
NAMES = {
    "encoder.mask_embedding": "mask_emb",
    "encoder.feature_encoder.layers.{}": "feature_extractor.conv_layers.{}.0",
    "encoder.feature_encoder.layers.{}.norm": "feature_extractor.conv_layers.{}.2.1",
    "encoder.feature_norm": "layer_norm",
    "encoder.feature_projection": "post_extract_proj",
    "encoder.transformer.positional": POSITIONAL,
    "encoder.transformer.positional.magnitude": f"{POSITIONAL}.weight_g",
    "encoder.transformer.positional.direction": f"{POSITIONAL}.weight_v",
    # fairseq has a single LayerNorm outside the blocks: before them in post-LN models, after them in pre-LN models.
    "encoder.transformer.embedding_norm": "encoder.layer_norm",
    "encoder.transformer.final_norm": "encoder.layer_norm",
    "encoder.transformer.blocks.{}.attention.qkv": "encoder.layers.{}.self_attn.[qkv]_proj",
    "encoder.transformer.blocks.{}.attention.out": "encoder.layers.{}.self_attn.out_proj",
    "encoder.transformer.blocks.{}.attention_norm": "encoder.layers.{}.self_attn_layer_norm",
    "encoder.transformer.blocks.{}.feed_forward.intermediate": "encoder.layers.{}.fc1",
    "encoder.transformer.blocks.{}.feed_forward.output": "encoder.layers.{}.fc2",
    "encoder.transformer.blocks.{}.feed_forward_norm": "encoder.layers.{}.final_layer_norm",
    "quantizer.codevectors": "quantizer.vars",
    "quantizer.projection": "quantizer.weight_proj",
    "context_projection": "final_proj",
    "target_projection": "project_q",
}
NAMES_WITH_GROUP_NORM = NAMES | {"encoder.feature_encoder.layers.{}.norm": "feature_extractor.conv_layers.{}.2"}
# Tensor names of the newer weight norm in PyTorch, used in checkpoints since 2023.
PARAMETRISED_NAMES = {
    f"{POSITIONAL}.parametrizations.weight.original0": f"{POSITIONAL}.weight_g",
    f"{POSITIONAL}.parametrizations.weight.original1": f"{POSITIONAL}.weight_v",
}
FINE_TUNED_PREFIX = "w2v_encoder."

# fairseq setting: our setting. None of them affects the shape of a tensor.
COUNTERPARTS = {
    "sample_rate": "sampling_rate",
    "feature_grad_mult": "feature_grad_mult",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "input_dropout",
    "dropout_features": "feature_dropout",
    "encoder_layerdrop": "layerdrop",
    "mask_prob": "mask_probability",
    "mask_length": "mask_length",
    "num_negatives": "negatives",
    "logit_temp": "logit_temperature",
}
# Settings without a counterpart, and the only value of each that our model supports.
FIXED: dict[str, object] = {
    "quantize_targets": True,
    "quantize_input": False,
    "same_quantizer": False,
    "quantizer_depth": 1,
    "target_glu": False,
    "negatives_from_everywhere": False,
    "cross_sample_negatives": 0,
    "codebook_negatives": 0,
    "infonce": True,
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "attn_type": "",
    "pos_enc_type": "abs",
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
    "crop_seq_to_multiple": 1,
    "mask_selection": "static",
    "mask_other": 0,
    "no_mask_overlap": False,
    "mask_dropout": 0,
    "mask_channel_prob": 0,
}
# Heads by width, and strides by kernel sizes, of the published models: for checkpoints without settings.
PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}
PUBLISHED_STRIDES = {tuple(kernel for _, kernel, _ in BASE_CONV_LAYERS): [stride for _, _, stride in BASE_CONV_LAYERS]}

EXPRESSION_LENGTH = 1000
"""Maximum length in characters of a setting that is an expression, and maximum number of elements of its value."""


def from_fairseq(checkpoint: FairseqCheckpoint) -> tuple[Config, dict[str, Tensor]]:
    """Return the settings and the `state_dict` (fp32) of `Wav2Vec2ForPretraining`.

    Sizes come from the tensor shapes, other settings from the checkpoint. Missing settings are taken from the published
    models (strides, heads; pre-LN blocks and normalised waveforms if the feature extractor has LayerNorm) or, if they
    matter only in training, from our defaults.

    Raises:
        UserError: our model does not support the checkpoint; the message names the first such setting or tensor.
    """
    state = {PARAMETRISED_NAMES.get(name, name): tensor for name, tensor in checkpoint.state.items()}
    try:
        config = _config(state, checkpoint.settings)
        names = NAMES if config.model.conv_norm == "layer" else NAMES_WITH_GROUP_NORM
        return config, to_ours(state, model_shapes(expected_of(config, optimizer=False)), names)
    except UserError as error:
        raise UserError(" ".join(f"{checkpoint.path}: {error}".split())) from None


def _config(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Config:
    if any(name.startswith(FINE_TUNED_PREFIX) for name in state):
        raise UserError(
            f"a fine-tuned model ({FINE_TUNED_PREFIX}…): these cannot be imported yet; "
            "import the pretrained checkpoint that it started from"
        )
    for name, meant in FIXED.items():
        value = _literal(settings.get(name))
        if value is not None and value != meant:
            raise UserError(f"{name}={value}: cannot be imported, because w2vscale supports only {name}={meant!r}")
    parsed: dict[str, Any] = {}
    for section, values in by_section({**_architecture(state, settings), **_training(settings)}).items():
        try:
            parsed[section] = PRETRAINING[section].model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{section}.{name}={first['input']!r}: " for name in first["loc"][:1])
            raise UserError(f"settings that w2vscale does not support: {where}{first['msg']}") from None
    return Config(**parsed | {"objective": ObjectiveConfig(**parsed["objective"].model_dump())})


def _architecture(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine tensor shapes and features."""
    dim, group_width, positional_kernel = _shape(state, f"{POSITIONAL}.weight_v", 3)
    convolutions = [
        _shape(state, f"feature_extractor.conv_layers.{index}.0.weight", 3)
        for index in range(_count(state, "feature_extractor.conv_layers"))
    ]
    channels = convolutions[0][0] if convolutions else 0
    conv_norm = "layer" if "feature_extractor.conv_layers.0.2.1.weight" in state else "group"
    heads = _known(settings, "encoder_attention_heads", PUBLISHED_HEADS.get(dim))
    strides = PUBLISHED_STRIDES.get(tuple(kernel for _, _, kernel in convolutions))
    if strides is None or settings.get("conv_feature_layers") is not None:
        strides = _strides(_known(settings, "conv_feature_layers"), convolutions)
    norm_first = _known(settings, "layer_norm_first", conv_norm == "layer")
    _, codes, code_width = _shape(state, "quantizer.vars", 3)
    projection_dim, codevector_dim = _shape(state, "project_q.weight", 2)
    codebooks = codevector_dim // max(code_width, 1)
    found = {
        "normalize_waveform": _known(settings, "normalize", conv_norm == "layer"),
        "conv_layers": [(width, kernel, s) for (width, _, kernel), s in zip(convolutions, strides, strict=True)],
        "conv_norm": conv_norm,
        "conv_bias": "feature_extractor.conv_layers.0.0.bias" in state,
        "layers": _count(state, "encoder.layers"),
        "dim": dim,
        "ffn_dim": _shape(state, "encoder.layers.0.fc1.weight", 2)[0],
        "heads": heads,
        "norm_first": norm_first,
        "embedding_norm": not norm_first,
        "positional_kernel": positional_kernel,
        "positional_groups": dim // max(group_width, 1),
        "codebooks": codebooks,
        "codebook_entries": codes // max(codebooks, 1),
        "codevector_dim": codevector_dim,
        "projection_dim": projection_dim,
    }
    return {**found, "conv_norm_groups": channels} if conv_norm == "group" else found


def _training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of masks, losses and dropout that the checkpoint has."""
    found = {
        ours: _literal(settings[theirs]) for theirs, ours in COUNTERPARTS.items() if settings.get(theirs) is not None
    }
    if settings.get("latent_temp") is not None:
        found |= zip(("gumbel_start", "gumbel_end", "gumbel_decay"), _numbers(settings, "latent_temp", 3), strict=True)
    if settings.get("loss_weights") is not None:
        found |= zip(("diversity_weight", "feature_penalty_weight"), _numbers(settings, "loss_weights", 2), strict=True)
    return found


def _strides(layers: Any, convolutions: list[list[int]]) -> list[int]:
    """Return the stride of each convolution, from the fairseq list of (channels, kernel, stride)."""
    try:
        found = _evaluate(ast.parse(_short(layers), mode="eval").body) if isinstance(layers, str) else layers
        channels_and_kernels = [[channels, kernel] for channels, kernel, _ in found]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"conv_feature_layers={layers!r}: not a list of (channels, kernel, stride)") from None
    if channels_and_kernels != [[channels, kernel] for channels, _, kernel in convolutions]:
        raise UserError(f"conv_feature_layers={layers!r} does not fit the weights of the feature extractor")
    return [stride for _, _, stride in found]


def _evaluate(node: ast.expr) -> list[Any]:
    """Evaluate an expression such as "[(512, 10, 5)] + [(512, 3, 2)] * 4" safely (fairseq passes it to `eval`)."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _evaluate(left) + _evaluate(right)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if times <= EXPRESSION_LENGTH:
            value = _evaluate(left)
            if len(value) * times > EXPRESSION_LENGTH:
                raise ValueError("too long")
            return value * times
    return list(ast.literal_eval(node))


def _literal(value: Any) -> Any:
    """Parse a number or list that the fairseq command line stored as text."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(_short(value))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


def _short(text: str) -> str:
    if len(text) > EXPRESSION_LENGTH:
        raise ValueError("too long")
    return text


def _numbers(settings: Mapping[str, Any], name: str, count: int) -> list[float]:
    value = _literal(settings[name])
    if not isinstance(value, list | tuple) or len(value) != count:
        raise UserError(f"{name}={value!r}: expected {count} numbers")
    return list(value)


def _known(settings: Mapping[str, Any], name: str, published: Any = None) -> Any:
    value = _literal(settings.get(name))
    value = published if value is None else value
    if value is None:
        raise UserError(f"its settings lack {name}, and its weights do not have the shapes of a published model")
    return value


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.([0-9]{{1,4}})\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in state:
        raise UserError(f"tensor {name} is missing: is this a pretraining checkpoint of wav2vec 2.0?")
    shape = list(state[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"tensor {name} has {len(shape)} dimensions, not {dimensions}")
    return shape
