"""The parts of a model that FSDP2 gathers one by one: feature encoder, positional convolution, each block, the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from w2vscale.errors import UserError, counted
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder

BEFORE_BLOCKS = 2
"""Units before the first block. The last unit is the rest: what is in no other."""


def unit_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that FSDP2 shards one by one, in the order of the forward.

    Raises UserError if the model has not exactly one encoder.
    """
    encoders = [found for found in model.named_modules() if isinstance(found[1], Wav2Vec2Encoder)]
    if len(encoders) != 1:
        raise UserError(
            f"{type(model).__name__}: has {counted(len(encoders), 'encoder')}; "
            "memory and time can be predicted for models with one"
        )
    ((name, encoder),) = encoders
    blocks = [f"transformer.blocks.{index}" for index in range(len(encoder.transformer.blocks))]
    return [f"{name}.{part}" for part in ("feature_encoder", "transformer.positional", *blocks)]


def unit_of(parameter: str, names: Sequence[str]) -> int:
    """Return the place of the module of a parameter in `names`, or behind the last if it is in none of them."""
    return next((number for number, name in enumerate(names) if parameter.startswith(f"{name}.")), len(names))
