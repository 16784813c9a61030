"""Renaming tensors between libraries, and sorting settings into sections: shared by all formats.

An entry of a table {our name: their name} names a tensor, or a module whose tensors have the same names in both. `{}`
is the number of a layer. `[qkv]` stands for three of their tensors, stacked by rows in one of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.lazy import LazyTensor, stacked
from w2vscale.config import Config, ModelConfig, ObjectiveConfig, RegularizationConfig, parse_section
from w2vscale.config.load import first_problem
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import ContrastiveSettings
from w2vscale.objectives.ctc import CtcSettings
from w2vscale.optim.canonical import model_shapes

T = TypeVar("T")

# PyTorch's weight norm calls them so since 2023, and weight_g and weight_v before.
MAGNITUDE, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"

# Names in a block of our encoder, in Transformers and in fairseq.
BLOCK = [
    ("attention.qkv", "attention.[qkv]_proj", "self_attn.[qkv]_proj"),
    ("attention.out", "attention.out_proj", "self_attn.out_proj"),
    ("attention_norm", "layer_norm", "self_attn_layer_norm"),
    ("feed_forward.intermediate", "feed_forward.intermediate_dense", "fc1"),
    ("feed_forward.output", "feed_forward.output_dense", "fc2"),
    ("feed_forward_norm", "final_layer_norm", "final_layer_norm"),
]
# Names in our encoder, in Transformers (after "wav2vec2.") and in fairseq. The two libraries have one LayerNorm outside
# the blocks: before them in post-LN models, after them in pre-LN models.
ENCODER = [
    ("mask_embedding", "masked_spec_embed", "mask_emb"),
    ("feature_encoder.layers.{}", "feature_extractor.conv_layers.{}.conv", "feature_extractor.conv_layers.{}.0"),
    (
        "feature_encoder.layers.{}.norm",
        "feature_extractor.conv_layers.{}.layer_norm",
        "feature_extractor.conv_layers.{}.2.1",
    ),
    ("feature_norm", "feature_projection.layer_norm", "layer_norm"),
    ("feature_projection", "feature_projection.projection", "post_extract_proj"),
    ("transformer.positional", "encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
    ("transformer.positional.magnitude", f"encoder.pos_conv_embed.conv.{MAGNITUDE}", "encoder.pos_conv.0.weight_g"),
    ("transformer.positional.direction", f"encoder.pos_conv_embed.conv.{DIRECTION}", "encoder.pos_conv.0.weight_v"),
    ("transformer.embedding_norm", "encoder.layer_norm", "encoder.layer_norm"),
    ("transformer.final_norm", "encoder.layer_norm", "encoder.layer_norm"),
    *(
        (f"transformer.blocks.{{}}.{ours}", f"encoder.layers.{{}}.{huggingface}", f"encoder.layers.{{}}.{fairseq}")
        for ours, huggingface, fairseq in BLOCK
    ),
]
HUGGINGFACE = {f"encoder.{ours}": f"wav2vec2.{theirs}" for ours, theirs, _ in ENCODER}
FAIRSEQ = {f"encoder.{ours}": theirs for ours, _, theirs in ENCODER}

CODEVECTORS = "quantizer.codevectors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Pretraining(BaseModel):
    """Sections of the settings of a pretraining model. Setting names are unique across these sections."""

    model: ModelConfig
    regularization: RegularizationConfig
    objective: ContrastiveSettings


KINDS: dict[str, Any] = {section: field.annotation for section, field in Pretraining.model_fields.items()}


def renamed(state: Mapping[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """The same tensors by other names. Raises UserError if two get the same name."""
    found: dict[str, T] = {}
    for theirs, tensor in state.items():
        if (name := rename(theirs)) in found:
            raise UserError(f"tensor {name} is there twice, once as {theirs}")
        found[name] = tensor
    return found


def older_weight_norm(state: Mapping[str, T], *, prefix: str = "") -> dict[str, T]:
    """Rename tensors of weight norm to their older names, and remove `prefix`. Raises UserError like `renamed`."""
    older = lambda name: name.replace(MAGNITUDE, "weight_g").replace(DIRECTION, "weight_v")  # noqa: E731
    return renamed(state, lambda name: older(name.removeprefix(prefix)))


def pretraining_model(settings: Mapping[str, Any], *, strict: bool = False) -> Config:
    """Return the `Config` of a pretraining model with these settings; unknown ones are left out.

    Raises pydantic's ValidationError if a value is not valid. `strict`: "48" is not valid for 48.
    """
    tree = {
        section: {key: settings[key] for key in settings if key in KINDS[section].model_fields} for section in KINDS
    }
    found = Pretraining.model_validate(tree, strict=strict)
    return Config(**dict(found) | {"objective": ObjectiveConfig(**found.objective.model_dump())})


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Turn errors of conversion in the block into one-line UserErrors that begin with `path`."""
    try:
        yield
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, Pretraining)}") from None
    except UserError as error:
        raise UserError(" ".join(f"{path}: {error}".split())) from None


def own_settings(config: Config) -> dict[str, dict[str, Any]]:
    """All our settings of a model, to put into a file of another library. Names of files on this machine stay here."""
    return {
        "model": config.model.model_dump(mode="json"),
        "regularization": config.regularization.model_dump(mode="json"),
        "objective": build_objective(config).settings.model_dump(mode="json", exclude={"sentencepiece"}),
    }


def with_ctc(pretraining: Config, **settings: Any) -> Config:
    """The settings of a CTC model with the encoder of `pretraining`. Raises UserError if a setting is not valid."""
    found = parse_section(CtcSettings, settings, name="objective")
    return pretraining.model_copy(update={"objective": ObjectiveConfig(**found.model_dump())})


def to_theirs(state: Mapping[str, LazyTensor], config: Config, table: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Rename our `state_dict` of a model with these settings by `table`. Values and dtypes do not change.

    Tensors outside the encoder that are not in `table` are left out.

    Raises UserError if the names or shapes of `state` do not fit `config`.
    """
    shapes = model_shapes(expected_of(config, optimizer=False))
    _check_names(state, shapes)
    theirs: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        _check_shape(name, state[name], shape)
    for name, parts in _names(shapes, table).items():
        theirs.update(zip(parts, state[name].chunks(len(parts)), strict=True))
    if CODEVECTORS in state and CODEVECTORS in table:
        theirs[table[CODEVECTORS]] = state[CODEVECTORS].view(1, -1, shapes[CODEVECTORS][2])
    return theirs


def to_ours(state: Mapping[str, LazyTensor], config: Config, table: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Convert a `state_dict` with the names in `table` to ours, in fp32.

    Raises UserError if the names or shapes of `state` do not fit `config`, or a tensor is not floating point.
    """
    shapes = model_shapes(expected_of(config, optimizer=False))
    names = _names(shapes, table)
    _check_names(state, [part for parts in names.values() for part in parts])
    ours: dict[str, LazyTensor] = {}
    for name, parts in names.items():
        rows, *rest = shapes[name]
        wanted = (1, rows * rest[0], rest[1]) if name == CODEVECTORS else (rows // len(parts), *rest)
        tensors = [state[part] for part in parts]
        for part, tensor in zip(parts, tensors, strict=True):
            if tensor.dtype not in FLOATS:
                raise UserError(f"tensor {part} is {tensor.dtype}, not floating point")
            _check_shape(part, tensor, wanted)
        whole = stacked(tensors).map(torch.Tensor.float, torch.float32)
        ours[name] = whole if whole.shape == shapes[name] else whole.view(*shapes[name])
    return ours


def their_name(ours: str, table: Mapping[str, str]) -> str | None:
    """The name of one of our tensors in another library, with `[qkv]` as in the table; None if `table` lacks it."""
    number = re.search(r"(?<=\.)\d+(?=\.)", ours)
    entry = ours.replace(number[0], "{}", 1) if number else ours
    module, _, leaf = entry.rpartition(".")
    if entry not in table and module not in table:
        return None
    theirs = table[entry] if entry in table else f"{table[module]}.{leaf}"
    return theirs.replace("{}", number[0]) if number else theirs


def _names(ours: Iterable[str], table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in ours:
        theirs = their_name(name, table)
        if theirs is None:
            assert not name.startswith("encoder."), name
            continue
        found[name] = tuple(theirs.replace("[qkv]", which) for which in "qkv") if "[qkv]" in theirs else (theirs,)
    return found


def _check_names(state: Mapping[str, LazyTensor], expected: Iterable[str]) -> None:
    expected = set(expected)
    for names, what in ((expected - state.keys(), "missing"), (state.keys() - expected, "unknown")):
        if names:
            counted = f"tensor {min(names)} is {what} ({len(names)} {what} in all)"
            raise UserError(f"{counted}: not a wav2vec 2.0 model, or one with other settings")


def _check_shape(name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(f"tensor {name} has shape {list(tensor.shape)}, but the settings need {list(shape)}")
