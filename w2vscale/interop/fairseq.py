"""Convert wav2vec 2.0 checkpoints of fairseq, pretrained or fine-tuned with CTC, to our tensor names and settings.

Covers the names and settings in `models/wav2vec/wav2vec2.py` and `wav2vec2_asr.py` of all fairseq releases.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.remote import FAIRSEQ_SYMBOLS
from w2vscale.config import Config, RegularizationConfig, load_config
from w2vscale.config.tree import BASE_CONV_LAYERS
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import FairseqCheckpoint, mapped
from w2vscale.interop.names import FAIRSEQ, errors_naming, older_weight_norm, pretraining_model, to_ours, with_ctc
from w2vscale.interop.shapes import Shapes, published_preset
from w2vscale.interop.symbols import symbols_of

NAMES = FAIRSEQ | {
    "quantizer.codevectors": "quantizer.vars",
    "quantizer.projection": "quantizer.weight_proj",
    "context_projection": "final_proj",
    "target_projection": "project_q",
}
GROUP_NORM = {"encoder.feature_encoder.layers.{}.norm": "feature_extractor.conv_layers.{}.2"}
FINE_TUNED = "w2v_encoder.w2v_model."  # before the names of the encoder in a fine-tuned model
CTC_NAMES = FAIRSEQ | {"head": "w2v_encoder.proj"}

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
COUNTERPARTS_OF_LISTS = {
    "latent_temp": ("gumbel_start", "gumbel_end", "gumbel_decay"),
    "loss_weights": ("diversity_weight", "feature_penalty_weight"),
}
# Settings without a counterpart, and the only value of each that our model supports.
FIXED: dict[str, object] = {
    "quantize_targets": True, "quantize_input": False, "same_quantizer": False, "quantizer_depth": 1,
    "target_glu": False, "negatives_from_everywhere": False, "cross_sample_negatives": 0, "codebook_negatives": 0,
    "infonce": True, "activation_fn": "gelu", "layer_type": "transformer", "attn_type": "", "pos_enc_type": "abs",
    "pos_conv_depth": 1, "conv_pos_batch_norm": False, "crop_seq_to_multiple": 1,
    "mask_selection": "static", "mask_other": 0, "no_mask_overlap": False, "mask_dropout": 0, "mask_channel_prob": 0,
}  # fmt: skip
EXPRESSION_LENGTH = 1000
"""Maximum length in characters of a setting that is an expression, and maximum number of elements of its value."""


def from_fairseq(checkpoint: FairseqCheckpoint, tokenizer: Path | None = None) -> tuple[Config, dict[str, LazyTensor]]:
    """Return the settings and the `state_dict` (fp32) of `Wav2Vec2ForPretraining` or `Wav2Vec2ForCTC`.

    Sizes come from the tensor shapes, other settings from the checkpoint. Missing settings are taken from the published
    models (strides, heads, trimmed masks; pre-LN blocks and normalised waveforms if the feature extractor has
    LayerNorm) or, if they matter only in training, from our defaults. The symbols of a fine-tuned model are in
    `tokenizer`, or in the dictionary beside the file.

    Raises UserError if our model does not support the checkpoint; the message names the first such setting or tensor.
    """
    with errors_naming(checkpoint.path):
        state = older_weight_norm(checkpoint.state, prefix=FINE_TUNED)
    settings = _evaluated(checkpoint.settings)
    table = CTC_NAMES if f"{CTC_NAMES['head']}.weight" in state else NAMES
    shapes = Shapes(state, table)
    with errors_naming(checkpoint.path):
        if table is NAMES:
            _refuse_others(settings)
            config = pretraining_model(_architecture(shapes, settings) | shapes.quantizer() | _training(settings))
        else:
            count = shapes.of("head.weight", 2)[0]
            symbols = symbols_of(checkpoint.path, tokenizer, FAIRSEQ_SYMBOLS, count=count)
            config = with_ctc(_fine_tuned(shapes, settings), **symbols)
        norm = {} if config.model.conv_norm == "layer" else GROUP_NORM
        return config, to_ours(mapped(state), config, table | norm)


def _fine_tuned(shapes: Shapes, settings: Mapping[str, Any]) -> Config:
    """Return the settings of the encoder, and those of its dropout in fine-tuning."""
    given = settings.get("w2v_args", {})  # those of the pretrained model
    given = given.get("model", given) if isinstance(given, dict) else {}
    pretrained = _evaluated(given if isinstance(given, dict) else {})
    _refuse_others(pretrained)
    names = {ours: theirs for theirs, ours in COUNTERPARTS.items() if ours in RegularizationConfig.model_fields}
    names["layerdrop"] = "layerdrop"
    regularization = {ours: settings[theirs] for ours, theirs in names.items() if theirs in settings}
    normalize = {"normalize": settings["normalize"]} if "normalize" in settings else {}
    return pretraining_model(_architecture(shapes, pretrained | normalize) | regularization)


def _refuse_others(settings: Mapping[str, Any]) -> None:
    for name, meant in FIXED.items():
        if (value := settings.get(name, meant)) != meant:
            raise UserError(f"{name}={value}: cannot be imported, because w2vscale supports only {name}={meant!r}")


def _architecture(shapes: Shapes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine tensor shapes and features."""
    encoder = shapes.encoder()
    preset = published_preset(encoder)
    published = load_config(preset).model if preset else None
    layer_norm = encoder["conv_norm"] == "layer"
    heads = _known(settings, "encoder_attention_heads", published.heads if published else None)
    conv_layers = _conv_layers(shapes.convolutions(), settings)
    norm_first = _known(settings, "layer_norm_first", layer_norm)
    found = {
        **encoder,
        "normalize_waveform": _known(settings, "normalize", layer_norm),
        "waveform_eps": 1e-5,  # of torch.nn.functional.layer_norm, which fairseq normalises with
        "conv_layers": conv_layers,
        "heads": heads,
        "norm_first": norm_first,
        "embedding_norm": not norm_first,
    }
    return found if layer_norm or not conv_layers else found | {"conv_norm_groups": conv_layers[0][0]}


def _conv_layers(sizes: Sequence[tuple[int, int]], settings: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return channels, kernel and stride of each convolution. Shapes do not show the strides."""
    published = None
    if [kernel for _, kernel in sizes] == [kernel for _, kernel, _ in BASE_CONV_LAYERS]:
        published = [(*size, stride) for size, (_, _, stride) in zip(sizes, BASE_CONV_LAYERS, strict=True)]
    layers = _known(settings, "conv_feature_layers", published)
    try:
        found = [(channels, kernel, stride) for channels, kernel, stride in layers]
    except (ValueError, TypeError):
        raise UserError(f"conv_feature_layers={layers!r}: not a list of (channels, kernel, stride)") from None
    if [(channels, kernel) for channels, kernel, _ in found] != sizes:
        raise UserError(f"conv_feature_layers={layers!r} does not fit the weights of the feature extractor")
    return found


def _training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of masks, losses and dropout that the checkpoint has."""
    found = {ours: settings[theirs] for theirs, ours in COUNTERPARTS.items() if theirs in settings}
    for theirs, ours in COUNTERPARTS_OF_LISTS.items():
        values = settings.get(theirs)
        if values is not None:
            if not isinstance(values, list | tuple) or len(values) != len(ours):
                raise UserError(f"{theirs}={values!r}: expected {len(ours)} numbers")
            found |= zip(ours, values, strict=True)
    return found | {"mask_trim": "micro_batch" if settings.get("require_same_masks", True) else "none"}


def _evaluated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate settings with `_value`, and leave out those that are None."""
    values = {name: _value(setting) for name, setting in settings.items()}
    return {name: value for name, value in values.items() if value is not None}


def _value(setting: Any) -> Any:
    """Evaluate a number, a list, or a sum or multiple of lists that the fairseq command line stored as text.

    An example is "[(512, 10, 5)] + [(512, 3, 2)] * 4", which fairseq passes to `eval`. Other text is returned as it is.
    """
    if not isinstance(setting, str) or len(setting) > EXPRESSION_LENGTH:
        return setting
    try:
        return _evaluate(ast.parse(setting.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return setting


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return [*_evaluate(left), *_evaluate(right)]
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if times <= EXPRESSION_LENGTH:
            values = list(_evaluate(left))
            if len(values) * times > EXPRESSION_LENGTH:
                raise ValueError("too long")
            return values * times
    return ast.literal_eval(node)


def _known(settings: Mapping[str, Any], name: str, published: Any) -> Any:
    """Return a setting of the checkpoint, or else that of the published model with such weights."""
    value = settings.get(name, published)
    if value is None:
        raise UserError(f"its settings lack {name}, and its weights do not have the shapes of a published model")
    return value
