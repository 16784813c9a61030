"""Engines run updates: one file per backend, one contract."""

from __future__ import annotations

import torch

from w2vscale.config import Config
from w2vscale.engine.activation_checkpointing import recompute_activations
from w2vscale.engine.base import CanonicalState, Criterion, Engine, EngineCaps, StateReader, StepResult
from w2vscale.engine.compilation import compile_blocks
from w2vscale.engine.host_memory import keep_freed_memory
from w2vscale.models.build import Wav2Vec2

__all__ = ["CanonicalState", "Criterion", "Engine", "EngineCaps", "StateReader", "StepResult", "build_engine"]


def build_engine(model: Wav2Vec2, criterion: Criterion, config: Config, device: torch.device) -> Engine:
    """The engine that `engine.name` asks for. Collective.

    `model` is on the meta device. The engine's parameters hold nothing until one of its imports.

    Raises:
        UserError: the engine's settings are wrong, or what it needs is not installed.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        # From torch 2.11 on it is preferred on Hopper GPUs, and builds a plan for each new shape of a batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
    recompute_activations(model, config.engine)
    compile_blocks(model, config.engine)
    # Imported here: each backend takes its time, and only one is needed.
    if config.engine.name == "fsdp":
        from w2vscale.engine.fsdp import FSDPEngine

        return FSDPEngine(model, criterion, config, device)
    if config.engine.name == "deepspeed":
        from w2vscale.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(model, criterion, config, device)
    from w2vscale.engine.ddp import DDPEngine

    return DDPEngine(model, criterion, config, device)
