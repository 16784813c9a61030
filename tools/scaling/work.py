"""What a preset has to compute and to send: parameters and floating-point operations, counted on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from tools.bench.contenders import Work, work_settings
from w2vscale.config import Config
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder
from w2vscale.objectives import build_objective
from w2vscale.training.run import empty_model

FILLED = 0.9
"""Seconds of audio of a micro-batch, of the `batch.max_seconds` that it may have (docs/performance.md, The plan)."""


@dataclass(frozen=True)
class Unit:
    """A part of the model that FSDP2 gathers at once: feature encoder, positional convolution, a block, or the rest."""

    shapes: tuple[tuple[int, ...], ...]  # of its parameters
    flops: float  # of a second of audio, forward and backward
    whole: bool  # FSDP2 gathers it in fp32 whatever the precision

    @cached_property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes))

    def padded(self, ranks: int) -> int:
        """Elements that FSDP2 sends: it splits each parameter by its first dimension, which it pads."""
        rows = ((shape[0] if shape else 1, math.prod(shape[1:])) for shape in self.shapes)
        return sum(ranks * math.ceil(first / ranks) * rest for first, rest in rows)

    def padded_flat(self, ranks: int, *, above: int = 0) -> int:
        """Elements that ZeRO-3 sends: it splits each parameter as a flat one. Without those of fewer than `above`."""
        sizes = map(math.prod, self.shapes)
        return sum(ranks * math.ceil(size / ranks) for size in sizes if size >= above)


@dataclass(frozen=True)
class Model:
    """The model of a preset. `units` are in the order of the forward; the last one, the rest, includes the loss."""

    preset: str
    config: Config
    units: tuple[Unit, ...]
    backward: tuple[tuple[int, int], ...]  # (elements, unit) of each parameter, the last one first

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(unit.elements for unit in self.units)

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of a second of audio, forward and backward."""
        return sum(unit.flops for unit in self.units)

    @property
    def micro_batch_seconds(self) -> float:
        """Audio of one micro-batch."""
        return FILLED * self.config.batch.max_seconds

    def share(self, unit: Unit) -> float:
        """The part of the operations that a unit has."""
        return unit.flops / self.flops

    def activation_bytes(self) -> float:
        """Activations that a second of audio saves, in bf16 with FlashAttention and without recomputation.

        A line through 33 MB for `base` and 241 MB for `xlsr_2b`, which were added up from the operations.
        """
        return 10e6 + 2.5e3 * self.config.model.layers * self.config.model.dim


def model_of(preset: str, settings: Sequence[str] = ()) -> Model:
    """Count the model of a pretraining preset.

    Raises:
        UserError: there is no such preset, or it is not one of wav2vec 2.0 pretraining.
    """
    config = work_settings(preset, settings)
    seconds = config.data.max_seconds
    model = empty_model(build_objective(config))
    counted = Work(config, 1, seconds).counted_flops().get_flop_counts()
    counts = {name: sum(by_operation.values()) for name, by_operation in counted.items()}
    names = unit_names(model)
    parameters = [(unit_of(name, names), parameter.shape) for name, parameter in model.named_parameters()]
    flops = [counts.get(f"{type(model).__name__}.{name}", 0) / seconds for name in names]
    flops.append(counts["Global"] / seconds - sum(flops))
    units = tuple(
        Unit(
            tuple(tuple(shape) for unit, shape in parameters if unit == number),
            flops[number],
            whole=number < 2,  # feature encoder and positional convolution
        )
        for number in range(len(names) + 1)
    )
    backward = tuple((shape.numel(), unit) for unit, shape in reversed(parameters))
    return Model(preset, config, units, backward)


def unit_names(model: nn.Module) -> list[str]:
    """Names of the modules that FSDP2 shards one by one, in the order of the forward."""
    ((name, encoder),) = [found for found in model.named_modules() if isinstance(found[1], Wav2Vec2Encoder)]
    blocks = [f"transformer.blocks.{index}" for index in range(len(encoder.transformer.blocks))]
    return [f"{name}.{part}" for part in ("feature_encoder", "transformer.positional", *blocks)]


def unit_of(parameter: str, names: Sequence[str]) -> int:
    """The place of a parameter's module in `names`, or behind the last if it is in none of them."""
    return next((number for number, name in enumerate(names) if parameter.startswith(f"{name}.")), len(names))
