"""Engines run updates. Each backend (DDP, FSDP2, DeepSpeed) implements the protocol in `base.py`."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import Config
from w2vscale.engine.base import Engine, ExportedState, StateReader, StoredState
from w2vscale.errors import UserError
from w2vscale.objectives import Objective

__all__ = ["Engine", "ExportedState", "StateReader", "StoredState", "build_engine"]


def build_engine(model: nn.Module, config: Config, objective: Objective, device: torch.device) -> Engine:
    """Build the engine that `engine.name` selects, on the `device` of this rank. Collective.

    `model` has empty parameters (`models.initialisation.empty_parameters`). They get their values from
    `Engine.import_state` or `Engine.import_values`. Raises UserError if the engine cannot do what the objective needs,
    its settings are invalid, or a required package is not installed.
    """
    sections = (config.engine, config.optim, config.precision)
    # Imported here because each backend is slow to import and only one is needed.
    if config.engine.name == "fsdp":
        from w2vscale.engine.fsdp import FSDPEngine

        return FSDPEngine(model, *sections, device)
    if config.engine.name == "deepspeed":
        from w2vscale.engine.deepspeed.engine import DeepSpeedEngine

        if objective.changes_model:
            raise UserError(
                f"engine.name=deepspeed: objective.name={config.objective.name} changes the model after each step, "
                "which ZeRO does not allow; choose engine.name=ddp or fsdp"
            )
        return DeepSpeedEngine(model, *sections, device)
    from w2vscale.engine.ddp import DDPEngine

    return DDPEngine(model, *sections, device)
