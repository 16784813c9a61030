"""Conversions of models in memory: those of w2vscale.interop, with tensors in place of lazy ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from w2vscale.checkpoint.lazy import lazy, whole
from w2vscale.config import Config
from w2vscale.interop import fairseq, huggingface
from w2vscale.interop.fairseq_file import FairseqCheckpoint


def to_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The `state_dict` of Transformers. Its tensors share no memory, as safetensors demands."""
    return {name: tensor.clone() for name, tensor in whole(huggingface.to_huggingface(lazy(state), config)).items()}


def from_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our `state_dict`."""
    return whole(huggingface.from_huggingface(lazy(state), config))


def from_fairseq(checkpoint: FairseqCheckpoint) -> tuple[Config, dict[str, Tensor]]:
    """Settings and our `state_dict`."""
    config, state = fairseq.from_fairseq(checkpoint)
    return config, whole(state)
