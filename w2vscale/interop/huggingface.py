"""Weights and settings of a pretraining model in the format of Hugging Face Transformers, both ways.

Maps between our `Wav2Vec2ForPretraining` and Transformers' `Wav2Vec2ForPreTraining` (5.x). Names and shapes only:
Transformers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from w2vscale.config.tree import BASE_CONV_LAYERS, CtcConfig, ModelConfig
from w2vscale.data.transcripts import PIECE_SPACE, SPACE
from w2vscale.errors import UserError
from w2vscale.interop.names import to_ours, to_theirs
from w2vscale.objectives.ctc import BLANK

PRETRAINING = CtcConfig()
POSITIONAL = "wav2vec2.encoder.pos_conv_embed.conv"
NAMES = {
    "encoder.mask_embedding": "wav2vec2.masked_spec_embed",
    "encoder.feature_encoder.layers.{}": "wav2vec2.feature_extractor.conv_layers.{}.conv",
    "encoder.feature_encoder.layers.{}.norm": "wav2vec2.feature_extractor.conv_layers.{}.layer_norm",
    "encoder.feature_norm": "wav2vec2.feature_projection.layer_norm",
    "encoder.feature_projection": "wav2vec2.feature_projection.projection",
    "encoder.transformer.positional": POSITIONAL,
    "encoder.transformer.positional.magnitude": f"{POSITIONAL}.parametrizations.weight.original0",
    "encoder.transformer.positional.direction": f"{POSITIONAL}.parametrizations.weight.original1",
    # Transformers has one LayerNorm around the blocks: below them in post-LN models, above them in pre-LN models.
    "encoder.transformer.embedding_norm": "wav2vec2.encoder.layer_norm",
    "encoder.transformer.final_norm": "wav2vec2.encoder.layer_norm",
    "encoder.transformer.blocks.{}.attention.qkv": "wav2vec2.encoder.layers.{}.attention.[qkv]_proj",
    "encoder.transformer.blocks.{}.attention.out": "wav2vec2.encoder.layers.{}.attention.out_proj",
    "encoder.transformer.blocks.{}.attention_norm": "wav2vec2.encoder.layers.{}.layer_norm",
    "encoder.transformer.blocks.{}.feed_forward.intermediate": (
        "wav2vec2.encoder.layers.{}.feed_forward.intermediate_dense"
    ),
    "encoder.transformer.blocks.{}.feed_forward.output": "wav2vec2.encoder.layers.{}.feed_forward.output_dense",
    "encoder.transformer.blocks.{}.feed_forward_norm": "wav2vec2.encoder.layers.{}.final_layer_norm",
    "quantizer.codevectors": "quantizer.codevectors",
    "quantizer.projection": "quantizer.weight_proj",
    "context_projection": "project_hid",
    "target_projection": "project_q",
    "head": "lm_head",
}
# What PyTorch's older weight norm called its tensors, as in checkpoints published before 2023.
LEGACY_NAMES = {
    f"{POSITIONAL}.weight_g": f"{POSITIONAL}.parametrizations.weight.original0",
    f"{POSITIONAL}.weight_v": f"{POSITIONAL}.parametrizations.weight.original1",
}

# Transformers' setting: ours, and what a config.json that leaves it out means (transformers 5.23, `Wav2Vec2Config`).
ARCHITECTURE: dict[str, tuple[str, Any]] = {
    "conv_bias": ("conv_bias", False),
    "feat_extract_norm": ("conv_norm", "group"),
    "hidden_size": ("dim", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("ffn_dim", 3072),
    "do_stable_layer_norm": ("norm_first", False),
    "num_conv_pos_embeddings": ("positional_kernel", 128),
    "num_conv_pos_embedding_groups": ("positional_groups", 16),
    "num_codevector_groups": ("codebooks", 2),
    "num_codevectors_per_group": ("codebook_entries", 320),
    "codevector_dim": ("codevector_dim", 256),
    "proj_codevector_dim": ("projection_dim", 256),
}
TRAINING: dict[str, tuple[str, Any]] = {
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
    "feat_proj_dropout": ("input_dropout", 0.0),
    "feat_quantizer_dropout": ("feature_dropout", 0.0),
    "layerdrop": ("layerdrop", 0.1),
    "num_negatives": ("negatives", 100),
    "contrastive_logits_temperature": ("logit_temperature", 0.1),
    "diversity_loss_weight": ("diversity_weight", 0.1),
}
PREPROCESSOR: dict[str, tuple[str, Any]] = {
    "sampling_rate": ("sampling_rate", 16_000),
    "do_normalize": ("normalize_waveform", True),
}
CONVOLUTIONS = dict(zip(("conv_dim", "conv_kernel", "conv_stride"), zip(*BASE_CONV_LAYERS, strict=True), strict=True))
FIXED = {"feat_extract_activation": "gelu", "hidden_act": "gelu", "layer_norm_eps": 1e-5}


def to_huggingface(state: Mapping[str, Tensor], config: ModelConfig, ctc: CtcConfig = PRETRAINING) -> dict[str, Tensor]:
    """The `state_dict` of our model as that of Transformers' model; values and types unchanged.

    Raises:
        UserError: Transformers has no such model, or `state` is not one of `config`.
    """
    _refuse_unrepresentable(config)
    return to_theirs(state, config, ctc, NAMES)


def from_huggingface(
    state: Mapping[str, Tensor], config: ModelConfig, ctc: CtcConfig = PRETRAINING
) -> dict[str, Tensor]:
    """The `state_dict` of Transformers' model as that of our model, fp32; the inverse of `to_huggingface`.

    Raises:
        UserError: Transformers has no such model, or `state` is not one of `config`.
    """
    _refuse_unrepresentable(config)
    return to_ours({LEGACY_NAMES.get(name, name): tensor for name, tensor in state.items()}, config, ctc, NAMES)


def huggingface_config(config: ModelConfig, ctc: CtcConfig = PRETRAINING) -> dict[str, Any]:
    """The contents of `config.json`. Whatever Transformers' default differs from pretraining in is written out.

    The entry "w2vscale" has all our settings, also those that Transformers has no name for.

    Raises:
        UserError: Transformers has no such model.
    """
    _refuse_unrepresentable(config)
    convolutions = (list(column) for column in zip(*config.conv_layers, strict=True))
    return {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForPreTraining"],
        **dict(zip(CONVOLUTIONS, convolutions, strict=True)),
        **{theirs: getattr(config, ours) for theirs, (ours, _) in (ARCHITECTURE | TRAINING).items()},
        **FIXED,
        "apply_spec_augment": True,
        "mask_time_prob": config.mask_probability,
        "mask_time_length": config.mask_length,
        "mask_time_min_masks": config.mask_min_spans,
        "mask_feature_prob": 0.0,
        "w2vscale": config.model_dump(mode="json"),
        **(_head_config(ctc) if ctc.vocabulary else {}),
    }


def _head_config(ctc: CtcConfig) -> dict[str, Any]:
    symbols = {"pad": ctc.vocabulary[BLANK], "bos": "<s>", "eos": "</s>"}
    return {
        "architectures": ["Wav2Vec2ForCTC"],
        "vocab_size": len(ctc.vocabulary),
        **{
            f"{name}_token_id": ctc.vocabulary.index(symbol)
            for name, symbol in symbols.items()
            if symbol in ctc.vocabulary
        },
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        "final_dropout": ctc.final_dropout,
        "mask_feature_prob": ctc.channel_mask_probability,
        "mask_feature_length": ctc.channel_mask_length,
    }


def tokenizer_files(ctc: CtcConfig) -> dict[str, dict[str, Any]]:
    """The contents of `vocab.json` and `tokenizer_config.json`.

    Transformers' tokenizer joins symbols as they are, so sentence pieces have real spaces there.
    """

    def present(symbol: str) -> str | None:
        return symbol if symbol in ctc.vocabulary else None

    return {
        "vocab.json": {symbol.replace(PIECE_SPACE, " "): number for number, symbol in enumerate(ctc.vocabulary)},
        "tokenizer_config.json": {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "processor_class": "Wav2Vec2Processor",
            "pad_token": ctc.vocabulary[BLANK],
            "unk_token": present("<unk>"),
            "bos_token": present("<s>"),
            "eos_token": present("</s>"),
            "word_delimiter_token": SPACE if SPACE in ctc.vocabulary else " ",
            "replace_word_delimiter_char": " ",
            "do_lower_case": False,
        },
    }


def ctc_config(document: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> CtcConfig:
    """The output layer's settings from `config.json` and `vocab.json`, with CTC's blank first.

    Raises:
        UserError: they do not fit each other, or the blank is not the first symbol.
    """
    numbers = sorted((number, symbol) for symbol, number in vocabulary.items() if isinstance(number, int))
    if [number for number, _ in numbers] != list(range(len(vocabulary))) or len(vocabulary) != document.get(
        "vocab_size"
    ):
        raise UserError(
            f"vocab.json: does not name the {document.get('vocab_size')} symbols of config.json's vocab_size"
        )
    if document.get("pad_token_id", BLANK) != BLANK:
        raise UserError(f"config.json: pad_token_id={document['pad_token_id']!r}: CTC's blank must be symbol {BLANK}")
    try:
        return CtcConfig(
            vocabulary=[symbol.replace(" ", PIECE_SPACE) for _, symbol in numbers],
            final_dropout=document.get("final_dropout", 0.1),
            channel_mask_probability=document.get("mask_feature_prob", 0.0),
            channel_mask_length=document.get("mask_feature_length", 10),
        )
    except ValidationError as error:
        raise UserError(f"config.json: {error.errors()[0]['msg']}") from None


def preprocessor_config(config: ModelConfig, ctc: CtcConfig = PRETRAINING) -> dict[str, Any]:
    """The contents of `preprocessor_config.json`: how audio was treated in training."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "processor_class": "Wav2Vec2Processor" if ctc.vocabulary else "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # Transformers' GroupNorm counts padding; models that have it were trained, and are used, without a mask.
        "return_attention_mask": config.conv_norm == "layer",
        "sampling_rate": config.sampling_rate,
    }


def model_config(document: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> ModelConfig:
    """The settings of a model from its `config.json` and those of its feature extractor; the inverse of the above.

    What Transformers' settings do not say (masks in pretraining, the Gumbel softmax' schedule, gradient scale, feature
    penalty; the normalisation, if `preprocessor` is None) is as in the entry "w2vscale", or, if there is none or it
    is of another architecture, as in the published recipe for such a model.

    Raises:
        UserError: it is not a wav2vec 2.0 that w2vscale has.
    """
    if document.get("model_type") != "wav2vec2":
        raise UserError(f"config.json: model_type={document.get('model_type')!r}: only wav2vec2 can be imported")
    for key, wanted in FIXED.items():
        if document.get(key, wanted) != wanted:
            raise UserError(f"config.json: {key}={document[key]!r}: w2vscale has {wanted!r} only")
    if document.get("add_adapter"):
        raise UserError("config.json: add_adapter=true: w2vscale has no adapters")
    conv_layers = _conv_layers(document)
    architecture = {"conv_layers": conv_layers, **_translated(document, ARCHITECTURE)}
    norm_first = architecture["norm_first"]
    is_base = isinstance(architecture["dim"], int) and architecture["dim"] <= 768 and not norm_first
    unsaid = {
        "normalize_waveform": architecture["conv_norm"] == "layer",
        "conv_norm_groups": conv_layers[0][0],
        "gumbel_end": 0.5 if is_base else 0.1,
        "feature_grad_mult": 1.0 if norm_first else 0.1 if is_base else 0.03,
        "feature_penalty_weight": 0.0 if norm_first else 10.0,
    }
    ours = document.get("w2vscale")
    if isinstance(ours, dict) and all(ours.get(key) == value for key, value in architecture.items()):
        unsaid |= ours
    said = {**architecture, "embedding_norm": not norm_first, **_translated(document, TRAINING)}
    if preprocessor is not None:
        said |= _translated(preprocessor, PREPROCESSOR)
    try:
        # Strictly: "48" is no 48. Then a list is no tuple either.
        return ModelConfig.model_validate(
            {**unsaid, **said, "conv_layers": tuple(map(tuple, conv_layers))}, strict=True
        )
    except ValidationError as error:
        raise UserError(_told(error)) from None


def _conv_layers(document: Mapping[str, Any]) -> list[list[Any]]:
    columns = {key: document.get(key, default) for key, default in CONVOLUTIONS.items()}
    for key, column in columns.items():
        if not isinstance(column, list | tuple) or not column:
            raise UserError(f"config.json: {key}={column!r}: not a list of numbers")
        if len(column) != len(columns["conv_dim"]):
            raise UserError(f"config.json: {key} is of {len(column)} layers, conv_dim of {len(columns['conv_dim'])}")
    return [list(layer) for layer in zip(*columns.values(), strict=True)]


def _translated(document: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {ours: document.get(theirs, default) for theirs, (ours, default) in table.items()}


def _told(error: ValidationError) -> str:
    """The first error, by Transformers' name of the setting."""
    first = error.errors()[0]
    problem = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"config.json: {problem}"
    setting, *place = map(str, first["loc"])
    theirs = {ours: key for key, (ours, _) in (ARCHITECTURE | TRAINING | PREPROCESSOR).items()}
    key = theirs.get(setting, f"w2vscale.{setting}")
    if setting == "conv_layers":
        key = tuple(CONVOLUTIONS)[int(place[1])]
    return f"{'feature extractor' if key in PREPROCESSOR else 'config.json'}: {key}={first['input']!r}: {problem}"


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
