"""Model transforms shared by all engines: activation checkpointing, compilation and sharding, in this order."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from w2vscale.config import EngineConfig
from w2vscale.errors import UserError
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder


def transform(model: Any, config: EngineConfig, *, compiled: bool, shard: Callable[[Any], None] | None = None) -> None:
    """Apply activation checkpointing, then compilation, then `shard`; each wraps the one before."""
    encoders = [module for module in model.modules() if isinstance(module, Wav2Vec2Encoder)]
    for encoder in encoders:
        _recompute_activations(encoder, config)
        if compiled:
            _compile(encoder)
    if shard is not None:
        shard(model)


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether `engine.compile` asks for compilation on `device`. UserError if it is true and there is no compiler."""
    if config.compile is False or (config.compile == "auto" and device.type != "cuda"):
        return False
    compiler = os.environ.get("CXX", "g++")  # the one that torch.compile uses
    found = shutil.which(compiler) is not None
    if config.compile is True and not found:
        raise UserError(f"engine.compile=true: torch.compile needs a C++ compiler, and {compiler} (CXX) was not found")
    return found


def _recompute_activations(encoder: Wav2Vec2Encoder, config: EngineConfig) -> None:
    """Apply activation checkpointing (Chen et al. 2016, arXiv:1604.06174).

    Modules keep only their inputs and are recomputed in the backward, with the same dropout.
    """
    if config.activation_checkpointing == "none":
        return
    every = {"features": None, "selective": config.activation_checkpointing_every, "full": 1}
    step = every[config.activation_checkpointing]
    blocks = [] if step is None else list(encoder.transformer.blocks)[::step]
    for module in (encoder.feature_encoder, *blocks):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _compile(encoder: Wav2Vec2Encoder) -> None:
    """Compile the feature encoder and each block for any numbers of utterances and frames. Blocks share their code."""
    for module in (encoder.feature_encoder, *encoder.transformer.blocks):
        module.forward = torch.compile(module.forward, dynamic=True, fullgraph=True)


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
