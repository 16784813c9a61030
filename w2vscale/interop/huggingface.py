"""Convert weights and settings to and from the format of Hugging Face Transformers (5.x).

Maps names and shapes only, so Transformers need not be installed. The names for the heads that an objective adds to
the encoder are in `Objective.transformers_head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.config import Config, ModelConfig
from w2vscale.config.tree import BASE_CONV_LAYERS
from w2vscale.data.vocabulary import BLANK, PIECE_SPACE
from w2vscale.errors import UserError
from w2vscale.interop.names import (
    DIRECTION,
    HUGGINGFACE,
    KINDS,
    MAGNITUDE,
    own_settings,
    pretraining_model,
    renamed,
    to_ours,
    to_theirs,
    with_ctc,
)
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import TRANSFORMERS_SETTINGS

PREFIX = "wav2vec2."  # of encoder tensors in models that have a head

# Transformers name: our name, and the default that applies if config.json lacks it (5.23, `Wav2Vec2Config`).
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
}
REGULARIZATION: dict[str, tuple[str, Any]] = {
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
    "feat_proj_dropout": ("input_dropout", 0.0),
    "layerdrop": ("layerdrop", 0.1),
}
PREPROCESSOR: dict[str, tuple[str, Any]] = {
    "sampling_rate": ("sampling_rate", 16_000),
    "do_normalize": ("normalize_waveform", True),
}
SETTINGS = ARCHITECTURE | REGULARIZATION | TRANSFORMERS_SETTINGS
CONVOLUTIONS = dict(zip(("conv_dim", "conv_kernel", "conv_stride"), zip(*BASE_CONV_LAYERS, strict=True), strict=True))
FIXED = {"feat_extract_activation": "gelu", "hidden_act": "gelu", "layer_norm_eps": 1e-5}


def to_huggingface(state: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """Convert our `state_dict` to the one of Transformers. Values and dtypes do not change.

    Raises UserError if Transformers has no such model, or `state` does not fit `config`.
    """
    refuse_unrepresentable(config.model)
    head = build_objective(config).transformers_head()
    theirs = to_theirs(state, config, {**HUGGINGFACE, **head.tensors})
    return theirs if head.tensors else {name.removeprefix(PREFIX): tensor for name, tensor in theirs.items()}


def from_huggingface(state: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """Convert the `state_dict` of a Transformers model to ours, in fp32. The inverse of `to_huggingface`."""
    refuse_unrepresentable(config.model)
    head = build_objective(config).transformers_head()
    named = renamed(state, lambda name: name.replace("weight_g", MAGNITUDE).replace("weight_v", DIRECTION))
    return to_ours(named, config, {**HUGGINGFACE, **head.tensors})


def huggingface_config(config: Config) -> dict[str, Any]:
    """Return the contents of `config.json`, including every setting whose Transformers default differs from ours.

    The entry "w2vscale" holds all our settings. Raises UserError if Transformers has no such model.
    """
    model = config.model
    refuse_unrepresentable(model)
    head = build_objective(config).transformers_head()
    convolutions = (list(column) for column in zip(*model.conv_layers, strict=True))
    return {
        "model_type": "wav2vec2",
        "architectures": [head.architecture],
        **dict(zip(CONVOLUTIONS, convolutions, strict=True)),
        **{theirs: getattr(model, ours) for theirs, (ours, _) in ARCHITECTURE.items()},
        **{theirs: getattr(config.regularization, ours) for theirs, (ours, _) in REGULARIZATION.items()},
        **FIXED,
        "apply_spec_augment": True,
        **head.settings,
        "w2vscale": own_settings(config),
    }


def preprocessor_config(model: ModelConfig, *, tokenizer: bool = False) -> dict[str, Any]:
    """Return the contents of `preprocessor_config.json`, for a feature extractor with or without a tokenizer."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "processor_class": "Wav2Vec2Processor" if tokenizer else "Wav2Vec2FeatureExtractor",
        "do_normalize": model.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # GroupNorm in Transformers includes padding in its statistics. Models with it are trained and used without an
        # attention mask.
        "return_attention_mask": model.conv_norm == "layer",
        "sampling_rate": model.sampling_rate,
    }


def pretraining_config(document: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Config:
    """Return the settings of a pretraining model, from `config.json` and the config of its feature extractor.

    Transformers has no setting for pretraining masks, Gumbel temperature, gradient scale and feature penalty, or, if
    `preprocessor` is None, for waveform normalisation. These come from the entry "w2vscale". If it is missing or
    belongs to another architecture, they come from the published recipe for such a model.

    Raises UserError if the model is not a wav2vec 2.0 model that w2vscale supports.
    """
    if document.get("model_type") != "wav2vec2":
        raise UserError(f"config.json: model_type={document.get('model_type')!r}: only wav2vec2 can be imported")
    for key, wanted in FIXED.items():
        if document.get(key, wanted) != wanted:
            raise UserError(f"config.json: {key}={document[key]!r}: w2vscale supports only {wanted!r}")
    if document.get("add_adapter"):
        raise UserError("config.json: add_adapter=true: w2vscale has no adapters")
    conv_layers = _conv_layers(document)
    found = _translated(document, SETTINGS)
    norm_first = found["norm_first"]
    is_base = isinstance(found["dim"], int) and found["dim"] <= 768 and not norm_first
    published = {
        "normalize_waveform": found["conv_norm"] == "layer",
        "conv_norm_groups": conv_layers[0][0],
        "gumbel_end": 0.5 if is_base else 0.1,
        "feature_grad_mult": 1.0 if norm_first else 0.1 if is_base else 0.03,
        "feature_penalty_weight": 0.0 if norm_first else 10.0,
    }
    architecture = {"conv_layers": conv_layers} | {ours: found[ours] for ours, _ in ARCHITECTURE.values()}
    settings = published | _own_settings(document, architecture) | found
    settings |= {"conv_layers": tuple(map(tuple, conv_layers)), "embedding_norm": not norm_first}
    if preprocessor is not None:
        settings |= _translated(preprocessor, PREPROCESSOR)
    try:
        return pretraining_model(settings, strict=True)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def ctc_config(
    pretraining: Config, document: Mapping[str, Any], vocabulary: Mapping[str, Any], *, phones: bool = False
) -> Config:
    """Return the settings of a CTC model: `pretraining` and the output layer in config.json and vocab.json.

    If its tokenizer is that of `phones`, its text has spaces between symbols. How others split text is in the entry
    "w2vscale", or shows in the symbols.
    """
    numbers = sorted((number, symbol) for symbol, number in vocabulary.items() if isinstance(number, int))
    size = document.get("vocab_size")
    if [number for number, _ in numbers] != list(range(len(vocabulary))) or len(vocabulary) != size:
        raise UserError(f"vocab.json: does not name the {size} symbols of vocab_size in config.json")
    if document.get("pad_token_id", BLANK) != BLANK:
        raise UserError(f"config.json: pad_token_id={document['pad_token_id']!r}: the CTC blank must be symbol {BLANK}")
    noted = document.get("w2vscale")
    ours = noted.get("objective") if isinstance(noted, dict) else None
    split = ours.get("split", "auto") if isinstance(ours, dict) and ours.get("name") == "ctc" else "auto"
    masks = {key: value for key, value in pretraining.objective.model_dump().items() if key.startswith("mask_")}
    return with_ctc(
        pretraining,
        vocabulary=[symbol.replace(" ", PIECE_SPACE) for _, symbol in numbers],
        split="spaces" if phones else split,
        final_dropout=document.get("final_dropout", 0.1),
        channel_mask_probability=document.get("mask_feature_prob", 0.0),
        channel_mask_length=document.get("mask_feature_length", 10),
        **masks,
    )


def _own_settings(document: Mapping[str, Any], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings from the entry "w2vscale" of an export, unless the architecture was changed since."""
    noted: Any = document.get("w2vscale")
    ours: dict[str, Any] = {}
    for section, kind in KINDS.items() if isinstance(noted, dict) else ():
        found = noted.get(section)
        found = dict(found) if isinstance(found, dict) else {}
        # A fine-tuned model has the settings of another objective.
        other = "name" in found and found.pop("name") != kind.model_fields["name"].default
        for key, value in found.items():
            if key in kind.model_fields:
                ours[key] = value
            elif not other:
                raise UserError(f"config.json: w2vscale.{section}.{key}={value!r}: unknown setting")
    return ours if all(ours.get(key) == value for key, value in architecture.items()) else {}


def _conv_layers(document: Mapping[str, Any]) -> list[list[Any]]:
    columns = {key: document.get(key, default) for key, default in CONVOLUTIONS.items()}
    for key, column in columns.items():
        if not isinstance(column, list | tuple) or not column:
            raise UserError(f"config.json: {key}={column!r}: not a list of numbers")
        if len(column) != len(columns["conv_dim"]):
            raise UserError(f"config.json: {key} has {len(column)} entries, conv_dim has {len(columns['conv_dim'])}")
    return [list(layer) for layer in zip(*columns.values(), strict=True)]


def _translated(document: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {ours: document.get(theirs, default) for theirs, (ours, default) in table.items()}


def _first_problem(error: ValidationError) -> str:
    """Format the first problem, with the Transformers name of the setting."""
    first = error.errors()[0]
    problem = first["msg"].removeprefix("Value error, ")
    _, *place = first["loc"]
    if not place:
        return f"config.json: {problem}"
    theirs = {ours: key for key, (ours, _) in (SETTINGS | PREPROCESSOR).items()}
    key = theirs.get(str(place[0]), f"w2vscale: {place[0]}")
    if place[0] == "conv_layers":
        key = tuple(CONVOLUTIONS)[int(place[2])]
    return f"{'feature extractor' if key in PREPROCESSOR else 'config.json'}: {key}={first['input']!r}: {problem}"


def refuse_unrepresentable(model: ModelConfig, library: str = "Hugging Face Transformers") -> None:
    """Raise UserError on the first setting without a counterpart in another library."""
    channels, norm_first = model.conv_layers[0][0], str(model.norm_first).lower()
    if model.conv_padding:
        setting = "model.conv_padding=true"
    elif model.conv_norm == "group" and model.conv_norm_groups != channels:
        setting = f"model.conv_norm_groups={model.conv_norm_groups} (with {channels} channels)"
    elif model.embedding_norm == model.norm_first:
        setting = f"model.embedding_norm={norm_first} with model.norm_first={norm_first}"
    elif model.max_frames is not None:
        setting = f"model.max_frames={model.max_frames}"
    else:
        return
    raise UserError(
        f"{setting}: {library} has no such wav2vec 2.0; only models of the published architectures can be converted"
    )
