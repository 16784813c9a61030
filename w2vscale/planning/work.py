"""What a model has to compute and to send: its parameters and floating-point operations, counted without computing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from w2vscale.config import Config, EngineConfig, Section
from w2vscale.kernels.packing import Packing
from w2vscale.kernels.table import Kernel
from w2vscale.models.initialisation import empty_parameters
from w2vscale.models.layers import cast_parameters, compute_dtype
from w2vscale.objectives import build_objective
from w2vscale.planning.fake_pass import DeviceType, fake_forward, run_fake
from w2vscale.planning.links import H100
from w2vscale.planning.operations import MISCOUNTED, Speeds
from w2vscale.planning.timeline import Timeline, timeline, with_layers
from w2vscale.planning.units import BEFORE_BLOCKS, unit_names, unit_of

FILLED = 0.9
"""Seconds of audio of a micro-batch, of the `batch.max_seconds` that it may have (docs/performance.md, The plan).
Assumed where the corpus is not known."""


@dataclass(frozen=True)
class Unit:
    """A part of the model that FSDP2 gathers at once: feature encoder, positional convolution, a block, or the rest."""

    shapes: tuple[tuple[int, ...], ...]  # of its parameters
    flops: float  # of a second of audio, forward and backward
    whole: bool  # FSDP2 gathers it in fp32 whatever the precision
    frozen: int = 0  # elements that are not trained

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
    """The model of a run. `units` are in the order of the forward; the last one, the rest, includes the loss."""

    name: str
    config: Config
    units: tuple[Unit, ...]
    backward: tuple[tuple[int, int], ...]  # (elements, unit) of each trained parameter, the last one first
    cast: int  # parameters that DDP keeps a second time in the type of the activations
    device: DeviceType = "cuda"
    speeds: Speeds = H100.speeds
    filled: float = FILLED  # part of a micro-batch that is audio

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(unit.elements for unit in self.units)

    @cached_property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return self.parameters - sum(unit.frozen for unit in self.units)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(math.prod(shape) for unit in self.units for shape in unit.shapes)

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of a second of audio, forward and backward."""
        return sum(unit.flops for unit in self.units)

    @cached_property
    def timeline(self) -> Timeline:
        """Memory and time of forward and backward, with utterances as long as `data.max_seconds` allows."""
        seconds = self.config.data.max_seconds
        return timeline(self.config, seconds=seconds, device=self.device, speeds=self.speeds)

    def with_settings(self, **sections: Section) -> Model:
        """Return the model with another engine or batch, without a change of recomputation or of utterances."""
        other = replace(self, config=self.config.model_copy(update=sections))
        if (known := self.__dict__.get("timeline")) is not None:  # where `cached_property` keeps it
            other.__dict__["timeline"] = known
        return other

    @property
    def utterances(self) -> float:
        """Utterances of `data.max_seconds` that a micro-batch has room for."""
        return self.config.batch.max_seconds / self.config.data.max_seconds

    @property
    def micro_batch_seconds(self) -> float:
        """Audio of one micro-batch."""
        return self.filled * self.config.batch.max_seconds

    def share(self, unit: Unit) -> float:
        """The part of the operations that a unit has."""
        return unit.flops / self.flops


def model_of(name: str, config: Config, *, device: DeviceType = "cuda", speeds: Speeds = H100.speeds) -> Model:
    """Count the model of a run that `name` stands for. `speeds` are those of the device that it will run on."""
    with empty_parameters():
        model = build_objective(config).build_model()
    names = unit_names(model)
    parameters = [(unit_of(each, names), parameter) for each, parameter in model.named_parameters()]
    flops = counted_flops(config)
    before, (block, rest) = flops[:BEFORE_BLOCKS], flops[BEFORE_BLOCKS:]
    units = []
    for number, each in enumerate([*before, *[block] * config.model.layers, rest]):
        own = [parameter for unit, parameter in parameters if unit == number]
        units.append(
            Unit(
                tuple(tuple(parameter.shape) for parameter in own),
                each,
                whole=number < BEFORE_BLOCKS,
                frozen=sum(parameter.numel() for parameter in own if not parameter.requires_grad),
            )
        )
    backward = [(parameter.numel(), unit) for unit, parameter in reversed(parameters) if parameter.requires_grad]
    cast = cast_parameters(model, compute_dtype(config.precision))
    copied = sum(parameter.numel() for parameter in cast)
    return Model(name, config, tuple(units), tuple(backward), copied, device, speeds)


def flops_per_second_of_audio(config: Config) -> float:
    """Floating-point operations of the whole model per second of audio, as in `counted_flops`."""
    flops = counted_flops(config)
    return sum(flops) + flops[BEFORE_BLOCKS] * (config.model.layers - 1)


def counted_flops(config: Config) -> list[float]:
    """Floating-point operations of a second of audio in each unit of a model of one layer, as the model is defined.

    That is without padding, recomputation, and what a device saves by other algorithms. A backward has twice the
    products of its forward, where its input has a gradient.
    """
    precision = config.precision.model_copy(update={"compute": "fp32"})
    config = with_layers(config.model_copy(update={"precision": precision, "engine": EngineConfig()}), 1)
    seconds = config.data.max_seconds
    attention = {("attention", "cpu"): Kernel(_attention)}
    with (
        fake_forward(config, utterances=1, seconds=seconds, kernels=attention) as (model, forward),
        FlopCounterMode(display=False, custom_mapping=MISCOUNTED) as counter,
        _ForFakes(),
    ):
        forward().backward()
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    flops = [counts.get(f"{type(model).__name__}.{name}", 0) / seconds for name in unit_names(model)]
    return [*flops, counts["Global"] / seconds - sum(flops)]


class _ForFakes(TorchDispatchMode):
    """Inside of the counter, lets fake tensors pass."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run_fake(function, args, kwargs or {})


def _attention(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float) -> Tensor:
    """Attention as two products."""
    q, k, v = (packing.unpack(x_NHE).transpose(1, 2) for x_NHE in (q_NHE, k_NHE, v_NHE))
    return packing.pack(((q @ k.transpose(2, 3)).softmax(dim=3) @ v).transpose(1, 2))
