"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): the same for every engine."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from w2vscale.config.tree import EngineConfig
from w2vscale.models.build import Wav2Vec2


def recompute_activations(model: Wav2Vec2, config: EngineConfig) -> None:
    """Have the chosen modules keep their inputs alone, and run again in the backward with the same dropout.

    Inside whatever an engine wraps around a module: gathered parameters are there when it runs again.
    """
    if config.activation_checkpointing == "none":
        return
    every = {"features": None, "selective": config.activation_checkpointing_every, "full": 1}
    chosen = every[config.activation_checkpointing]
    blocks = [] if chosen is None else list(model.encoder.transformer.blocks)[::chosen]
    for module in (model.encoder.feature_encoder, *blocks):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
