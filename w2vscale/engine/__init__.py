"""Engines run updates: one file per backend, one contract."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import Config
from w2vscale.engine.base import CanonicalState, Criterion, Engine, EngineCaps, StateReader, StepResult
from w2vscale.engine.ddp import DDPEngine

__all__ = ["CanonicalState", "Criterion", "Engine", "EngineCaps", "StateReader", "StepResult", "build_engine"]


def build_engine(model: nn.Module, criterion: Criterion, config: Config, device: torch.device) -> Engine:
    """The engine that `engine.name` asks for."""
    return DDPEngine(model, criterion, config, device)
