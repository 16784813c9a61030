"""What a checkpoint of a run with given settings must hold."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import Config
from w2vscale.objectives import build_objective
from w2vscale.optim.canonical import TensorSpec, expected_tensors


def expected_of(config: Config, *, optimizer: bool = True) -> dict[str, TensorSpec]:
    """Name, shape and type of every tensor, from the model alone: independent of engines and their mistakes."""
    return expected_tensors(meta_model(config), optimizer=optimizer)


def meta_model(config: Config) -> nn.Module:
    """The model that these settings describe, without memory for its values."""
    with torch.device("meta"):
        return build_objective(config).build_model()
