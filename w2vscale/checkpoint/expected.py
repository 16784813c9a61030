"""What a checkpoint of a run with given settings must hold."""

from __future__ import annotations

import torch
from torch import nn

from w2vscale.config import Config
from w2vscale.errors import UserError
from w2vscale.models.initialisation import NoDraws
from w2vscale.objectives import build_objective
from w2vscale.optim.canonical import TensorSpec, expected_tensors


def expected_of(config: Config, *, optimizer: bool = True) -> dict[str, TensorSpec]:
    """Name, shape and type of every tensor, from the model alone: independent of engines and their mistakes.

    Without `optimizer`, only those of the model.
    """
    return expected_tensors(meta_model(config), optimizer=optimizer, average=optimizer and config.optim.ema_decay > 0)


def meta_model(config: Config) -> nn.Module:
    """The model that these settings describe, without memory for its values. UserError if it is too large for that."""
    objective = build_objective(config)
    try:
        with torch.device("meta"), NoDraws():
            return objective.build_model()
    except (RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"no computer can hold the model of these settings: {reason}") from None
