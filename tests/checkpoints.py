"""What a checkpoint of some tensors, or of a model, must hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from w2vscale.checkpoint.canonical import canonical_shapes
from w2vscale.config import Config
from w2vscale.models.build import parameter_shapes


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Just these tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def model_and_optimizer(config: Config) -> dict[str, tuple[int, ...]]:
    """What a run with these settings saves."""
    return canonical_shapes(parameter_shapes(config.model, config.ctc))
