"""wav2vec 2.0 checkpoints of fairseq (`.pt` files): read without executing anything in them, and mapped to our names.

Tensor names and settings are those of fairseq's `models/wav2vec/wav2vec2.py`, from its first release (settings in an
`args` Namespace) to its last (in a `cfg` that omegaconf wrote). Neither fairseq nor omegaconf is needed.
"""

from __future__ import annotations

import ast
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from w2vscale.config.tree import BASE_CONV_LAYERS, ModelConfig
from w2vscale.errors import UserError
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining

POSITIONAL = "encoder.pos_conv.0"
# What PyTorch's newer weight norm calls its tensors, in checkpoints written after 2023.
PARAMETRISED_NAMES = {
    f"{POSITIONAL}.parametrizations.weight.original0": f"{POSITIONAL}.weight_g",
    f"{POSITIONAL}.parametrizations.weight.original1": f"{POSITIONAL}.weight_v",
}
FINE_TUNED_PREFIX = "w2v_encoder."

INERT_NAMES = (
    "argparse.Namespace",
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str", "tuple", "type")),
    *(f"typing.{kind}" for kind in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    "_operator.getitem",  # with builtins.type, how typing.Optional[int] is pickled
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
)
"""What a checkpoint may name beside tensors and classes of `INERT_PACKAGES`. A stand-in takes the place of each."""
INERT_PACKAGES = ("fairseq.", "omegaconf.")

# fairseq's setting: ours. Neither changes the shape of a tensor.
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
# Settings without a counterpart, and the one value of each that means what our model does.
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
# Of the published models, for checkpoints that come without settings.
PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}
PUBLISHED_STRIDES = {tuple(kernel for _, kernel, _ in BASE_CONV_LAYERS): [stride for _, _, stride in BASE_CONV_LAYERS]}

EXPRESSION_LENGTH = 1000
"""Characters of a setting that is an expression, and elements of its value, at most."""


@dataclass(frozen=True)
class FairseqCheckpoint:
    """What a `.pt` file of fairseq says about a model."""

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any]
    """Of the model, with those of task and criterion that no setting of the model is called like; may be empty."""


def load_fairseq(path: Path) -> FairseqCheckpoint:
    """Read a checkpoint, on the CPU. Nothing in the file is executed.

    PyTorch's weights-only reader builds tensors and containers; the classes of fairseq's settings are on its list of
    allowed names, but each name stands for an empty class of ours that keeps what it is given.

    Raises:
        UserError: `path` is no checkpoint of fairseq, is damaged, or names anything that could run code.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(path)):
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
        state = found.get("model") if isinstance(found, dict) else None
        settings = _settings(found) if state is not None else {}
    except OSError as error:
        raise UserError(_one_line(f"{path}: cannot be read: {error.strerror or error}")) from None
    except Exception as error:  # whatever a hand-made file makes the readers stumble over
        raise UserError(_one_line(f"{path}: {_reason(error)}")) from None
    if state is None:
        raise UserError(f'{path}: no checkpoint of fairseq: it has no entry "model"')
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f'{path}: no checkpoint of fairseq: its entry "model" does not hold tensors by name')
    return FairseqCheckpoint(path, dict(state), settings)


def from_fairseq(checkpoint: FairseqCheckpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The `state_dict` (fp32) of `Wav2Vec2ForPretraining`, and the settings of its `ModelConfig`.

    Shapes come from the tensors, the rest from the checkpoint's settings. What these do not say is as in the
    published models (strides, heads; pre-LN blocks and normalised waveforms with LayerNorm in the extractor) or, where
    it matters in training only, left to the defaults of `ModelConfig`.

    Raises:
        UserError: our model cannot be the checkpoint's; names the first setting or tensor that says so.
    """
    try:
        return _convert(checkpoint.state, checkpoint.settings)
    except UserError as error:
        raise UserError(_one_line(f"{checkpoint.path}: {error}")) from None


class _StandIn:
    """An object of any class that a checkpoint may name: keeps what it was made of, and does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Stands in for defaultdict: the reader fills plain dicts only."""
    return {}


def _stand_ins(path: Path) -> list[Any]:
    """The allow-list of one file."""
    named = {name for name in _named_globals(path) if name.startswith(INERT_PACKAGES)}
    return [(_empty_dict, "collections.defaultdict"), *((_StandIn, name) for name in sorted({*INERT_NAMES, *named}))]


def _named_globals(path: Path) -> Iterator[str]:
    """Every "module.name" in the pickles of a file, which are disassembled and not run.

    PyTorch's zip files hold one pickle; before 1.6 it wrote three short ones (magic number, protocol, system), then it.
    """
    with path.open("rb") as file:
        pickles: list[io.BufferedReader | io.BytesIO] = [file] * 4
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                pickles = [io.BytesIO(archive.read(name)) for name in records]
        else:
            file.seek(0)
        for stream in pickles:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")


def _reason(error: Exception) -> str:
    """Why a file cannot be read, from what PyTorch's reader or the disassembler raised."""
    refused = re.search(r"GLOBAL (\S+) w(?:as not|hose)", str(error))
    if refused:
        return f"refused: it names {refused[1]}, which is no part of a checkpoint of fairseq and could run code"
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return f"no checkpoint that PyTorch can read safely, or one cut short or damaged ({message.splitlines()[0]})"


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    config, arguments = (_plain(found.get(key)) for key in ("cfg", "args"))
    if isinstance(config, dict):
        sections = [config.get(section) for section in ("criterion", "task", "model")]
        return {name: value for section in sections if isinstance(section, dict) for name, value in section.items()}
    return arguments if isinstance(arguments, dict) else {}


def _plain(value: Any) -> Any:
    """Dicts, lists and scalars out of stand-ins for Namespace, enums and omegaconf's containers and nodes."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, _StandIn):
        return value
    if isinstance(value.state, dict):
        for holder in ("_content", "_val"):
            if holder in value.state:
                return _plain(value.state[holder])
        return _plain(value.state)
    return _plain(value.args[0]) if len(value.args) == 1 else value


def _convert(state: dict[str, Tensor], settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if any(name.startswith(FINE_TUNED_PREFIX) for name in state):
        raise UserError(
            f"a fine-tuned model ({FINE_TUNED_PREFIX}…): these cannot be imported yet; "
            "import the pretrained checkpoint that it started from"
        )
    for name, meant in FIXED.items():
        value = _literal(settings.get(name))
        if value is not None and value != meant:
            raise UserError(f"{name}={value}: our model has {name}={meant!r} only, so this one cannot be represented")
    state = {PARAMETRISED_NAMES.get(name, name): tensor for name, tensor in state.items()}
    overrides = {**_architecture(state, settings), **_training(settings)}
    try:
        config = ModelConfig.model_validate(overrides)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"model.{name}={first['input']!r}: " for name in first["loc"][:1])
        raise UserError(f"settings that our model cannot have: {where}{first['msg']}") from None

    names = _names(config)
    expected = {part for parts in names.values() for part in parts}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing:
        raise _missing(missing[0], f" ({len(missing)} missing in all)")
    if unknown:
        raise UserError(f"tensor {unknown[0]} is unknown ({len(unknown)} unknown in all): no plain wav2vec 2.0?")
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Wav2Vec2ForPretraining(config).state_dict().items()}
    shapes["quantizer.codevectors"] = [
        1,
        config.codebooks * config.codebook_entries,
        config.codevector_dim // config.codebooks,
    ]
    ours: dict[str, Tensor] = {}
    for name, parts in names.items():
        rows, *columns = shapes[name]
        for part in parts:
            wanted = [rows // len(parts), *columns]
            if list(state[part].shape) != wanted:
                raise UserError(
                    f"tensor {part} has shape {list(state[part].shape)}, the rest of the model has {wanted}"
                )
        ours[name] = torch.cat([state[part].detach().float() for part in parts])
    ours["quantizer.codevectors"] = ours["quantizer.codevectors"].view(config.codebooks, config.codebook_entries, -1)
    return ours, overrides


def _architecture(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tensors and features depend on."""
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
    """Settings of masks, losses and dropout, as far as the checkpoint has them."""
    found = {
        ours: _literal(settings[theirs]) for theirs, ours in COUNTERPARTS.items() if settings.get(theirs) is not None
    }
    if settings.get("latent_temp") is not None:
        found |= zip(("gumbel_start", "gumbel_end", "gumbel_decay"), _numbers(settings, "latent_temp", 3), strict=True)
    if settings.get("loss_weights") is not None:
        found |= zip(("diversity_weight", "feature_penalty_weight"), _numbers(settings, "loss_weights", 2), strict=True)
    return found


def _strides(layers: Any, convolutions: list[list[int]]) -> list[int]:
    """Of each convolution, from fairseq's list of (channels, kernel, stride)."""
    try:
        found = _evaluate(ast.parse(_short(layers), mode="eval").body) if isinstance(layers, str) else layers
        channels_and_kernels = [[channels, kernel] for channels, kernel, _ in found]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"conv_feature_layers={layers!r}: no list of (channels, kernel, stride)") from None
    if channels_and_kernels != [[channels, kernel] for channels, _, kernel in convolutions]:
        raise UserError(f"conv_feature_layers={layers!r} does not fit the weights of the feature extractor")
    return [stride for _, _, stride in found]


def _evaluate(node: ast.expr) -> list[Any]:
    """The value of an expression such as "[(512, 10, 5)] + [(512, 3, 2)] * 4", which fairseq gives to `eval`."""
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
    """fairseq's command line kept numbers and lists as text."""
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
        raise UserError(f"{name}={value!r}: our model needs {count} numbers")
    return list(value)


def _known(settings: Mapping[str, Any], name: str, published: Any = None) -> Any:
    value = _literal(settings.get(name))
    value = published if value is None else value
    if value is None:
        raise UserError(f"its settings do not say {name}, and its weights are of none of the published models")
    return value


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.([0-9]{{1,4}})\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in state:
        raise _missing(name)
    shape = list(state[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"tensor {name} has {len(shape)} dimensions, not {dimensions}")
    return shape


def _missing(name: str, more: str = "") -> UserError:
    return UserError(f"tensor {name} is missing{more}: is this a pretraining checkpoint of wav2vec 2.0?")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor, and its name in fairseq: several where ours is theirs, one below the other."""
    names: dict[str, tuple[str, ...]] = {
        "encoder.mask_embedding": ("mask_emb",),
        "encoder.transformer.positional.magnitude": (f"{POSITIONAL}.weight_g",),
        "encoder.transformer.positional.direction": (f"{POSITIONAL}.weight_v",),
        "encoder.transformer.positional.bias": (f"{POSITIONAL}.bias",),
        "quantizer.codevectors": ("quantizer.vars",),
    }

    def add_affine(ours: str, *theirs: str) -> None:
        names.update({f"{ours}.{leaf}": tuple(f"{name}.{leaf}" for name in theirs) for leaf in ("weight", "bias")})

    for index in range(len(config.conv_layers)):
        ours, theirs = f"encoder.feature_encoder.layers.{index}", f"feature_extractor.conv_layers.{index}"
        names[f"{ours}.weight"] = (f"{theirs}.0.weight",)
        if config.conv_bias:
            names[f"{ours}.bias"] = (f"{theirs}.0.bias",)
        if config.conv_norm == "layer":
            add_affine(f"{ours}.norm", f"{theirs}.2.1")
        elif index == 0:
            add_affine(f"{ours}.norm", f"{theirs}.2")
    add_affine("encoder.feature_norm", "layer_norm")
    add_affine("encoder.feature_projection", "post_extract_proj")
    # fairseq has one LayerNorm around the blocks: below them in post-LN models, above them in pre-LN models.
    norm = "final_norm" if config.norm_first else "embedding_norm"
    add_affine(f"encoder.transformer.{norm}", "encoder.layer_norm")
    for index in range(config.layers):
        ours, theirs = f"encoder.transformer.blocks.{index}", f"encoder.layers.{index}"
        add_affine(f"{ours}.attention.qkv", *(f"{theirs}.self_attn.{which}_proj" for which in "qkv"))
        add_affine(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        add_affine(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm")
        add_affine(f"{ours}.feed_forward.intermediate", f"{theirs}.fc1")
        add_affine(f"{ours}.feed_forward.output", f"{theirs}.fc2")
        add_affine(f"{ours}.feed_forward_norm", f"{theirs}.final_layer_norm")
    add_affine("quantizer.projection", "quantizer.weight_proj")
    add_affine("context_projection", "final_proj")
    add_affine("target_projection", "project_q")
    return names
