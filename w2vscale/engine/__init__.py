"""Engines run updates: one file per backend, one contract."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.engine.base import CanonicalState, Engine, StateReader, StepResult

__all__ = ["CanonicalState", "Engine", "StateReader", "StepResult", "build_engine"]


def build_engine(
    model: nn.Module,
    config: EngineConfig,
    *,
    optim: OptimConfig,
    precision: PrecisionConfig,
    device: torch.device,
    skips_parameters: bool,
) -> Engine:
    """The engine that `engine.name` chooses. Collective.

    `model` has empty parameters (`models.initialisation.empty_parameters`), which hold no values until one of the
    imports of the engine. `skips_parameters`: some updates leave parameters without a gradient.

    Raises:
        UserError: the settings of the engine are wrong, or what it needs is not installed.
    """
    # Imported here: each backend takes its time, and only one is needed.
    if config.name == "fsdp":
        from w2vscale.engine.fsdp import FSDPEngine

        return FSDPEngine(model, config, optim=optim, precision=precision, device=device)
    if config.name == "deepspeed":
        from w2vscale.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, optim=optim, precision=precision, device=device)
    from w2vscale.engine.ddp import DDPEngine

    return DDPEngine(model, config, optim=optim, device=device, skips_parameters=skips_parameters)
