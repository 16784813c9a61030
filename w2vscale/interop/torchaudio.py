"""torchaudio: the one gateway to it, which also works without its compiled extension; its wav2vec 2.0's state."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from w2vscale.config.tree import CtcConfig, ModelConfig
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import to_huggingface

EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """torchaudio; without its compiled parts where their libraries are missing.

    The wheel on PyPI for Linux is built for CUDA: beside a CPU-only torch its import raises OSError. Its Python
    parts (models, resampling) need no extension, so they are imported with a stand-in for it. transformers and Lhotse
    import torchaudio if it is installed: call this before importing them.

    Raises:
        UserError: torchaudio is not installed.
    """
    try:
        return importlib.import_module("torchaudio")
    except ImportError as error:
        raise UserError(f"torchaudio cannot be imported ({error}): pip install 'w2vscale[torchaudio]'") from None
    except OSError:
        pass
    extension = _absent_extension()
    sys.modules[EXTENSION] = extension
    try:
        torchaudio = importlib.import_module("torchaudio")
    except BaseException:
        del sys.modules[EXTENSION]
        raise
    vars(torchaudio)["_extension"] = extension
    return torchaudio


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


def _absent_extension() -> ModuleType:
    """What `torchaudio._extension` is where torchaudio was built without it."""
    extension = ModuleType(EXTENSION, "Stands in for an extension that cannot be loaded.")
    vars(extension).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        _load_lib=lambda library: False,
        fail_if_no_align=_fail_when_called,
    )
    return extension


def _fail_when_called(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{function.__name__} needs torchaudio's compiled extension, which cannot be loaded here")

    return fail
