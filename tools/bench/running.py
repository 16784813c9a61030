"""An engine as `w2vscale train` has it, for updates without the training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.helpers.engines import Setup, filled_model, set_up
from w2vscale import runtime
from w2vscale.config import Config

__all__ = ["Setup", "build", "filled_model"]


def build(config: Config, device: torch.device, *, prepare: Callable[[nn.Module], None] = lambda model: None) -> Setup:
    """Set up this process as for a training run, build the engine and give it its initial values. Collective.

    `prepare` changes the model before.
    """
    runtime.prepare_process(compile=config.engine.compile)
    return set_up(config, device, prepare=prepare)
