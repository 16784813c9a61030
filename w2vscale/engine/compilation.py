"""Compiled transformer blocks (torch.compile): the same for every engine."""

from __future__ import annotations

import os
import shutil

import torch

from w2vscale.config.tree import EngineConfig
from w2vscale.errors import UserError
from w2vscale.models.build import Wav2Vec2

VARIANTS = 64
"""Of a block, at most: with or without padding, gradients, dropout; of one utterance or several."""


def compile_blocks(model: Wav2Vec2, config: EngineConfig) -> None:
    """Compile each block for any number of utterances and frames; all blocks share their code.

    Inside whatever an engine wraps around a block, and around its recomputation.

    Raises:
        UserError: there is no C++ compiler, or the engine cannot have compiled blocks.
    """
    if not config.compile:
        return
    compiler = os.environ.get("CXX", "g++")  # as torch.compile does
    if shutil.which(compiler) is None:
        raise UserError(f"engine.compile=true: torch.compile needs a C++ compiler, and there is no {compiler} (CXX)")
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = VARIANTS
    # Of use where a whole model is compiled: it splits graphs where DDP's buckets end.
    dynamo.optimize_ddp = False
    for block in model.encoder.transformer.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
