"""Engines run updates. Each backend (DDP, FSDP2, DeepSpeed) implements the protocol in `base.py`."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import Config
from w2vscale.engine.base import CanonicalState, Engine, StateReader, StepResult
from w2vscale.objectives import Objective

__all__ = ["CanonicalState", "Engine", "StateReader", "StepResult", "build_engine"]


def build_engine(model: nn.Module, config: Config, objective: Objective, device: torch.device) -> Engine:
    """Build the engine that `engine.name` selects, on the `device` of this rank. Collective.

    `model` has empty parameters (`models.initialisation.empty_parameters`). They get their values from
    `Engine.import_state` or `Engine.import_values`. Raises UserError if the engine settings are invalid, or a required
    package is not installed.
    """
    # Imported here because each backend is slow to import and only one is needed.
    if config.engine.name == "fsdp":
        from w2vscale.engine.fsdp import FSDPEngine

        return FSDPEngine(model, config, device)
    if config.engine.name == "deepspeed":
        from w2vscale.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device)
    from w2vscale.engine.ddp import DDPEngine

    return DDPEngine(model, config, device, skips_parameters=objective.skips_parameters)
