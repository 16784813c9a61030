"""Engines run updates. Each backend (DDP, FSDP2, DeepSpeed) implements the protocol in `base.py`."""

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
    """Build the engine that `engine.name` selects. Collective.

    Args:
        model: model with empty parameters (`models.initialisation.empty_parameters`). They get their values from
            `Engine.import_state` or `Engine.import_values`.
        config: settings of the engine.
        optim: settings of the optimizer.
        precision: settings of precision.
        device: device of this rank.
        skips_parameters: whether some updates leave parameters without a gradient.

    Raises:
        UserError: the engine settings are invalid, or a required package is not installed.
    """
    # Imported here because each backend is slow to import and only one is needed.
    if config.name == "fsdp":
        from w2vscale.engine.fsdp import FSDPEngine

        return FSDPEngine(model, config, optim=optim, precision=precision, device=device)
    if config.name == "deepspeed":
        from w2vscale.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, optim=optim, precision=precision, device=device)
    from w2vscale.engine.ddp import DDPEngine

    return DDPEngine(model, config, optim=optim, device=device, skips_parameters=skips_parameters)
