"""Model transforms shared by all engines: compilation, activation checkpointing and sharding, in this order."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from w2vscale.config import EngineConfig
from w2vscale.errors import UserError
from w2vscale.kernels.packed_attention import has_flash_attention
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder


def transform(model: Any, config: EngineConfig, *, compiled: bool, shard: Callable[[Any], None] | None = None) -> None:
    """Apply compilation, then activation checkpointing, then `shard`; each wraps the one before.

    Checkpointing is outside of compiled code, because PyTorch 2.11 cannot compile recomputed dropout of dynamic sizes.
    """
    encoders = [module for module in model.modules() if isinstance(module, Wav2Vec2Encoder)]
    for encoder in encoders:
        if compiled:
            _compile(encoder)
        _recompute_activations(encoder, config)
    if shard is not None:
        shard(model)


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether `engine.compile` asks for compilation on `device`.

    Raises UserError if it is true and something that torch.compile needs is missing; with auto, nothing is compiled.
    """
    if config.compile is False or (config.compile == "auto" and device.type != "cuda"):
        return False
    missing = missing_for_compilation(device)
    if config.compile is True and missing is not None:
        raise UserError(f"engine.compile=true: torch.compile needs {missing}")
    return missing is None


def missing_for_compilation(device: torch.device) -> str | None:
    """Return what torch.compile needs on `device` and does not find, or None."""
    if device.type != "cuda":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"a C++ compiler, and {compiler} (CXX) was not found"
    # On GPUs, Triton compiles its kernels, and a C extension that launches them.
    if not has_triton():
        return "Triton and a GPU that it supports"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "gcc"), "clang")):
        return "a C compiler, and neither gcc nor clang (or that of CC) was found"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python (Python.h, in the package python3-dev)"
    return None


def _compile(encoder: Wav2Vec2Encoder) -> None:
    """Compile the feature encoder and each block for any numbers of utterances and frames. Blocks share their code."""
    # Marks the function itself. As a decorator it would make every process import torch._dynamo, which takes seconds.
    torch.compiler.assume_constant_result(has_flash_attention)
    for module in (encoder.feature_encoder, *encoder.transformer.blocks):
        module.forward = torch.compile(module.forward, dynamic=True, fullgraph=True)


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


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
