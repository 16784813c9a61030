"""Convert wav2vec 2.0 models to and from fairseq2: pretrained ones and those fine-tuned with CTC.

Covers the names in `models/wav2vec2` of fairseq2 0.5 to 0.8, which the Omnilingual models have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.remote import FAIRSEQ2_SYMBOLS
from w2vscale.config import Config, load_config
from w2vscale.config.load import first_problem
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import FairseqCheckpoint, mapped
from w2vscale.interop.huggingface import refuse_unrepresentable
from w2vscale.interop.names import (
    KINDS,
    errors_naming,
    older_weight_norm,
    pretraining_model,
    to_ours,
    to_theirs,
    with_ctc,
)
from w2vscale.interop.shapes import Shapes, published_preset
from w2vscale.interop.symbols import symbols_in, symbols_of, tokenizer_of
from w2vscale.objectives import build_objective, resolve

ENCODER = {
    "encoder.mask_embedding": "masker.temporal_mask_embed",
    "encoder.feature_encoder.layers.{}": "encoder_frontend.feature_extractor.layers.{}.conv",
    "encoder.feature_encoder.layers.{}.norm": "encoder_frontend.feature_extractor.layers.{}.layer_norm",
    "encoder.feature_norm": "encoder_frontend.post_extract_layer_norm",
    "encoder.feature_projection": "encoder_frontend.model_dim_proj",
    "encoder.transformer.positional": "encoder_frontend.pos_encoder.conv",
    "encoder.transformer.positional.magnitude": "encoder_frontend.pos_encoder.conv.weight_g",
    "encoder.transformer.positional.direction": "encoder_frontend.pos_encoder.conv.weight_v",
    "encoder.transformer.embedding_norm": "encoder_frontend.layer_norm",
    "encoder.transformer.final_norm": "encoder.layer_norm",
    "encoder.transformer.blocks.{}.attention.qkv": "encoder.layers.{}.self_attn.[qkv]_proj",
    "encoder.transformer.blocks.{}.attention.out": "encoder.layers.{}.self_attn.output_proj",
    "encoder.transformer.blocks.{}.attention_norm": "encoder.layers.{}.self_attn_layer_norm",
    "encoder.transformer.blocks.{}.feed_forward.intermediate": "encoder.layers.{}.ffn.inner_proj",
    "encoder.transformer.blocks.{}.feed_forward.output": "encoder.layers.{}.ffn.output_proj",
    "encoder.transformer.blocks.{}.feed_forward_norm": "encoder.layers.{}.ffn_layer_norm",
}
GROUP_NORM = {"encoder.feature_encoder.layers.{}.norm": "encoder_frontend.feature_extractor.layers.{}.group_norm"}
HEADS = {
    "wav2vec2": {
        "quantizer.codevectors": "quantizer.entries",
        "quantizer.projection": "quantizer.entry_proj",
        "context_projection": "final_proj",
        "target_projection": "final_target_proj",
    },
    "ctc": {"head": "final_proj"},
}
"""Names of the heads, by the name of our objective."""

UPDATES = "quantizer.num_updates"  # a buffer of pretrained models, for the temperature of the Gumbel softmax
MASK_EMBEDDING = ENCODER["encoder.mask_embedding"]
WAVEFORM_EPS = 1e-5  # of torch.nn.functional.layer_norm, which fairseq2 normalises with


def from_fairseq2(
    checkpoint: FairseqCheckpoint, tokenizer: Path | None = None, log: Callable[[str], None] = lambda text: None
) -> tuple[Config, dict[str, LazyTensor]]:
    """Return the settings and the `state_dict` (fp32) of `Wav2Vec2ForPretraining` or `Wav2Vec2ForCTC`.

    Settings are those that w2vscale has put into the file. Without them, sizes come from the tensor shapes, and all
    other settings from the preset of the published model with these sizes; the symbols of a CTC model are the pieces of
    `tokenizer`, a SentencePiece model, or of the one beside the file. A missing mask embedding becomes zero.

    Raises UserError if our model does not support the checkpoint; the message names the first such setting or tensor.
    """
    with errors_naming(checkpoint.path):
        named = older_weight_norm(checkpoint.state, prefix="module.")
    pretrained = any(name.startswith(("quantizer.", "final_target_proj.")) for name in named)
    objective = "wav2vec2" if pretrained else "ctc"
    shapes = Shapes(named, ENCODER | HEADS[objective])
    with errors_naming(checkpoint.path):
        state = mapped(named)
        settings = checkpoint.own
        config = _published_config(shapes, objective) if settings is None else _own_config(settings, objective)
        if pretrained:
            state.pop(UPDATES, None)
        else:
            config = _with_symbols(config, shapes, checkpoint.path, tokenizer)
            if MASK_EMBEDDING not in state:
                log(f"{checkpoint.path}: no mask embedding, because it was fine-tuned without masks: it becomes zero")
                state[MASK_EMBEDDING] = LazyTensor.of(torch.zeros(config.model.dim))
        return config, to_ours(state, config, _table(config))


def to_fairseq2(state: Mapping[str, LazyTensor], config: Config, *, update: int) -> dict[str, LazyTensor]:
    """Convert our `state_dict` to the one of fairseq2. Values do not change.

    A pretrained model also gets its number of updates. Raises UserError if fairseq2 has no such model, or `state` does
    not fit `config`.
    """
    table = _table(config)
    refuse_unrepresentable(config.model, "fairseq2")
    build_objective(config).transformers_head()  # refuses quantizers that fairseq2 does not have either
    if (width := config.model.dim) == config.model.conv_layers[-1][0]:
        raise UserError(f"model.dim={width}: fairseq2 has no projection of features of this width")
    theirs = to_theirs(state, config, table)
    if config.objective.name == "wav2vec2":
        theirs[UPDATES] = LazyTensor.of(torch.tensor(update))
    return theirs


def _table(config: Config) -> dict[str, str]:
    """Names of the tensors of a model with these settings, by ours."""
    if (name := config.objective.name) not in HEADS:
        raise UserError(f"objective.name={name}: fairseq2 has no wav2vec 2.0 with such heads")
    return ENCODER | (GROUP_NORM if config.model.conv_norm == "group" else {}) | HEADS[name]


def _published_config(shapes: Shapes, objective: str) -> Config:
    """The settings of the published model with these shapes; of a CTC model, those of its encoder."""
    sizes = shapes.encoder()
    heads = shapes.quantizer() if objective == "wav2vec2" else {}
    preset = published_preset(sizes)
    if preset is not None:
        config = load_config(preset)
        settings = build_objective(config).settings.model_dump()
        if heads.items() <= settings.items():
            model = config.model.model_dump() | sizes | {"waveform_eps": WAVEFORM_EPS}
            return pretraining_model(model | config.regularization.model_dump() | settings)
    found = " ".join(f"{name}={size}" for name, size in (sizes | heads).items())
    raise UserError(
        "the number of attention heads is unknown: fairseq2 does not store it, and the sizes are not those of a "
        f"published model ({found})"
    )


def _own_config(text: str, objective: str) -> Config:
    """The settings that w2vscale has put into a file. A stranger may have changed them."""
    try:
        document = json.loads(text)
        sections = {section: dict(document[section]) for section in KINDS}
        name, symbols = sections["objective"]["name"], sections["objective"].get("vocabulary", [])
        if name != objective or not isinstance(symbols, list) or sections["objective"].get("sentencepiece"):
            raise UserError(f"objective.name={name!r} does not fit the tensors, or names files")
        return resolve(Config.model_validate(sections))[0]
    except ValidationError as error:
        raise UserError(f"settings of w2vscale in it: {first_problem(error, Config)}") from None
    except UserError as error:
        raise UserError(f"settings of w2vscale in it: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"settings of w2vscale in it cannot be read: {type(error).__name__}: {error}") from None


def _with_symbols(config: Config, shapes: Shapes, path: Path, tokenizer: Path | None) -> Config:
    """Add the symbols of the output layer. If they are in the settings, those of a tokenizer must be the same."""
    count = shapes.of("head.weight", 2)[0]
    if config.objective.name != "ctc":
        return with_ctc(config, **symbols_of(path, tokenizer, FAIRSEQ2_SYMBOLS, count=count))
    tokenizer = tokenizer_of(path, tokenizer, FAIRSEQ2_SYMBOLS)
    if tokenizer is None:
        return config
    found = symbols_in(tokenizer, count=count)
    if found["vocabulary"] != build_objective(config).vocabulary:
        raise UserError(f"{tokenizer}: its symbols are not those that are in the file")
    return with_ctc(config, **config.objective.model_dump() | found)
