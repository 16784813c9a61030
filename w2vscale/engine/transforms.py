"""What every engine does to a model before it lays it out: recompute, compile, shard, in this order."""

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
    """Wrap the forwards of modules, from the inside out: recomputation, compilation, then sharding.

    Raises:
        UserError: blocks are to be compiled, and there is no C++ compiler.
    """
    _recompute_activations(model, config)
    _compile_blocks(model, config)
    shard(model)


def _recompute_activations(model: Any, config: EngineConfig) -> None:
    """Have modules keep only their inputs, and run again in the backward with the same dropout (activation
    checkpointing, Chen et al. 2016, arXiv:1604.06174)."""
    if config.activation_checkpointing == "none":
        return
    every = {"features": None, "selective": config.activation_checkpointing_every, "full": 1}
    step = every[config.activation_checkpointing]
    blocks = [] if step is None else list(model.encoder.transformer.blocks)[::step]
    for module in (model.encoder.feature_encoder, *blocks):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _compile_blocks(model: Any, config: EngineConfig) -> None:
    """Compile each block for any number of utterances and frames; all blocks share their code."""
    if not config.compile:
        return
    compiler = os.environ.get("CXX", "g++")  # as torch.compile does
    if shutil.which(compiler) is None:
        raise UserError(f"engine.compile=true: torch.compile needs a C++ compiler, and {compiler} (CXX) was not found")
    for block in model.encoder.transformer.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
