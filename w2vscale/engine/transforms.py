"""Model transforms shared by all engines: activation checkpointing, compilation and sharding, in this order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from w2vscale.config import EngineConfig
from w2vscale.errors import UserError


def transform(model: Any, config: EngineConfig, shard: Callable[[Any], None] = lambda model: None) -> None:
    """Apply activation checkpointing, then compilation, then `shard`; each wraps the one before.

    Raises UserError if `engine.compile` is set but there is no C++ compiler.
    """
    _recompute_activations(model, config)
    _compile_blocks(model, config)
    shard(model)


def _recompute_activations(model: Any, config: EngineConfig) -> None:
    """Apply activation checkpointing (Chen et al. 2016, arXiv:1604.06174).

    Modules keep only their inputs and are recomputed in the backward, with the same dropout.
    """
    if config.activation_checkpointing == "none":
        return
    every = {"features": None, "selective": config.activation_checkpointing_every, "full": 1}
    step = every[config.activation_checkpointing]
    blocks = [] if step is None else list(model.encoder.transformer.blocks)[::step]
    for module in (model.encoder.feature_encoder, *blocks):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _compile_blocks(model: Any, config: EngineConfig) -> None:
    """Compile each block for dynamic numbers of utterances and frames. All blocks share the compiled code."""
    if not config.compile:
        return
    compiler = os.environ.get("CXX", "g++")  # the one that torch.compile uses
    if shutil.which(compiler) is None:
        raise UserError(f"engine.compile=true: torch.compile needs a C++ compiler, and {compiler} (CXX) was not found")
    for block in model.encoder.transformer.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
