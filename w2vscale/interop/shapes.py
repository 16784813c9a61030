"""Find the sizes of a model from the shapes of its tensors, under the names of any library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.interop.names import CODEVECTORS, their_name

LAYERS = "encoder.transformer.blocks.{}.attention.out"
CONVOLUTIONS = "encoder.feature_encoder.layers.{}"

SIZES = ("layers", "dim", "ffn_dim", "conv_norm")
"""Settings that identify a published model. Its number of attention heads does not show in shapes."""
PUBLISHED = ("base", "large", "large_lv60", "xlsr_1b", "xlsr_2b", "omni_3b", "omni_7b")
"""Presets of the published models."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of tensors in another library, by our names. `table` has its names; see `w2vscale.interop.names`."""

    state: Mapping[str, Tensor]
    table: Mapping[str, str]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return their_name(name, self.table) in self.state

    def of(self, name: str, dimensions: int) -> list[int]:
        """The shape of a tensor. Raises UserError if it is missing or has another number of dimensions."""
        theirs = their_name(name, self.table)
        if theirs is None or theirs not in self.state:
            raise UserError(f"tensor {theirs} is missing: is this a checkpoint of wav2vec 2.0?")
        shape = list(self.state[theirs].shape)
        if len(shape) != dimensions:
            raise UserError(f"tensor {theirs} has {len(shape)} dimensions, not {dimensions}")
        return shape

    def count(self, entry: str) -> int:
        """The number of layers of an entry of the table with `{}`."""
        prefix, _, _ = self.table[entry].partition("{}")
        found = (re.match(rf"{re.escape(prefix)}([0-9]{{1,4}})\.", name) for name in self.state)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def convolutions(self) -> list[tuple[int, int]]:
        """Channels and kernel of each convolution. Shapes do not show the strides."""
        shapes = [self.of(f"{CONVOLUTIONS.format(index)}.weight", 3) for index in range(self.count(CONVOLUTIONS))]
        return [(channels, kernel) for channels, _, kernel in shapes]

    def encoder(self) -> dict[str, Any]:
        """The settings of the encoder that shapes show."""
        dim, group_width, positional_kernel = self.of("encoder.transformer.positional.direction", 3)
        first = CONVOLUTIONS.format(0)
        return {
            "conv_norm": "layer" if self.has(f"{first}.norm.weight") else "group",
            "conv_bias": self.has(f"{first}.bias"),
            "layers": self.count(LAYERS),
            "dim": dim,
            "ffn_dim": self.of("encoder.transformer.blocks.0.feed_forward.intermediate.weight", 2)[0],
            "positional_kernel": positional_kernel,
            "positional_groups": dim // max(group_width, 1),
        }

    def quantizer(self) -> dict[str, int]:
        """The settings of the pretraining heads that shapes show."""
        _, codes, code_width = self.of(CODEVECTORS, 3)
        projection_dim, codevector_dim = self.of("target_projection.weight", 2)
        codebooks = codevector_dim // max(code_width, 1)
        return {
            "codebooks": codebooks,
            "codebook_entries": codes // max(codebooks, 1),
            "codevector_dim": codevector_dim,
            "projection_dim": projection_dim,
        }


def published_preset(encoder: Mapping[str, Any]) -> str | None:
    """The preset of the published model with these sizes, which `Shapes.encoder` has found; None if there is none."""
    return _presets().get(tuple(encoder[key] for key in SIZES))


@cache
def _presets() -> dict[tuple[Any, ...], str]:
    """The presets of the published models by their sizes."""
    models = {name: load_config(name).model for name in PUBLISHED}
    found = {tuple(getattr(model, key) for key in SIZES): name for name, model in models.items()}
    # fairseq2's "5b" has no preset. It differs from "7b" in the number of layers only, which comes from the tensors.
    return found | {(96, 2048, 8192, "layer"): "omni_7b"}
