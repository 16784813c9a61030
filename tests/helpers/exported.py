"""Small models with random weights as checkpoints and as exports for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.objectives import build_objective
from w2vscale.optim.canonical import specs_of

FAMILIES = ("base", "large", "large_lv60", "xlsr_300m")
"""Presets of the published models."""


def random_model(config: Config, *, seed: int, biases_only: bool = False) -> Any:
    """The model of these settings. No bias is zero and no scale is one, so that each has to arrive in its place.

    `biases_only`: matrices keep their initial values.
    """
    torch.manual_seed(seed)
    model = build_objective(config).build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not biases_only:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_model(folder: Path, config: Config, state: dict[str, Tensor], train_state: TrainState) -> Path:
    """A checkpoint in the run `folder` with these weights and no optimizer state."""
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    store = CheckpointStore(folder / "checkpoints", Ranks(), expected=specs_of(tensors))
    return store.save(tensors, train_state, dump_config(config))


def load_model(config: Config, checkpoint: Path) -> Any:
    """The model of a checkpoint, in evaluation mode."""
    model = build_objective(config).build_model()
    model.load_state_dict(whole(open_checkpoint(checkpoint).model_tensors()))
    return model.eval()


def waveforms(config: Config, sizes: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Noise, normalised where the model wants it."""
    draws = np.random.default_rng(5)
    audio = [draws.standard_normal(size, dtype=np.float32) for size in sizes]
    if config.model.normalize_waveform:
        audio = [(one - one.mean()) / np.sqrt(one.var() + 1e-7) for one in audio]
    return audio
