"""A forward and backward with fake tensors: the memory that they take on a device, and the least time that they need.

Fake tensors have shapes and no values, so that nothing is computed, and no device has to be there. They are on the
CPU, but the kernels are those of the device: PyTorch cannot run the backward of tensors on a GPU that it was not built
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from w2vscale.config import Config
from w2vscale.data.inputs import Inputs, Utterance, with_tensors
from w2vscale.data.randomness import Stream, generator
from w2vscale.engine.transforms import transform
from w2vscale.errors import UserError
from w2vscale.kernels.packed_attention import flash_attention, suits_flash_attention
from w2vscale.kernels.packing import Packing
from w2vscale.kernels.replaceable import using
from w2vscale.kernels.table import KERNELS, Kernel
from w2vscale.models.layers import compute_dtype, weights_cast_once
from w2vscale.models.lengths import hop
from w2vscale.objectives import Objective, StepContext, build_objective
from w2vscale.planning.live_memory import LiveMemory
from w2vscale.planning.operations import Speeds, flops_of, seconds_of
from w2vscale.planning.units import unit_names, unit_of

DeviceType = Literal["cuda", "cpu"]


class Moment(NamedTuple):
    """The time up to an event: in the forward, a unit begins or ends; in the backward, a gradient is complete."""

    unit: int  # that runs, or whose gradient it is
    backward: bool
    gradient: int  # elements of the gradient that is complete; 0 in the forward
    live: float  # the most bytes of activations and temporary tensors meanwhile


class Pass(NamedTuple):
    """What a forward and backward take. `forward` and `backward` are seconds by the roofline model."""

    moments: list[Moment]
    forward: float
    backward: float


def fake_pass(config: Config, *, utterances: int, seconds: float, device: DeviceType, speeds: Speeds) -> Pass:
    """Run a forward and backward of one micro-batch of noise, with all layers.

    Raises UserError if the objective reads values of tensors.
    """
    kernels = kernels_on(device)
    with (
        fake_forward(config, utterances=utterances, seconds=seconds, kernels=kernels) as (model, forward),
        _Watch(model, speeds) as watch,
    ):
        loss = forward()
        watch.end(watch.rest)
        watch.in_backward = True
        loss.backward()
        watch.end(watch.unit)
    return Pass(watch.moments, watch.seconds[False], watch.seconds[True])


@contextmanager
def fake_forward(
    config: Config, *, utterances: int, seconds: float, kernels: Mapping[tuple[str, str], Kernel]
) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """Yield a model of fake tensors, and its forward on a micro-batch of noise, which returns the loss."""
    objective = build_objective(config)
    inputs, step = noise(objective, utterances=utterances, seconds=seconds), StepContext(0, 0, (0,), worst_case=True)
    with using(kernels), FakeTensorMode() as mode, _explained(config):
        model = objective.build_model().train()
        transform(model, config.engine, compiled=False)
        fake_inputs = with_tensors(inputs, mode.from_tensor)
        # As DDP does. Other engines hold the weights in this type in the first place.
        with weights_cast_once(model, compute_dtype(config.precision)):
            yield model, lambda: objective.forward(model, fake_inputs, step=step, training=True).total


@contextmanager
def _explained(config: Config) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise UserError(
            f"objective.name={config.objective.name}: its memory cannot be predicted, because the forward reads values "
            f"of tensors ({error.func})"
        ) from error


def noise(objective: Objective, *, utterances: int, seconds: float) -> Inputs:
    """Make a micro-batch of noise with the largest targets. The last of several utterances is a frame shorter.

    So the batch has padding, as nearly all have.
    """
    longest = int(seconds * objective.model.sampling_rate)
    lengths = [longest] * utterances
    if utterances > 1:
        lengths[-1] -= hop(objective.model)
    draws = np.random.default_rng(0)
    made = [
        Utterance(draws.standard_normal(length, np.float32), objective.largest_target(length), place)
        for place, length in enumerate(lengths)
    ]
    return objective.make_inputs(made, rng=lambda place: generator(0, Stream.MASK, 0, place))


def kernels_on(device: DeviceType) -> Mapping[tuple[str, str], Kernel]:
    """Return the kernels of a device, for fake tensors on the CPU that stand for tensors on it."""
    table = {(operation, "cpu"): kernel for (operation, owner), kernel in KERNELS.items() if owner == device}
    if device == "cuda":
        table |= {("attention", "cpu"): Kernel(_attention), ("dropout", "cpu"): Kernel(_dropout)}
    return table


def _attention(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, packing: Packing, probability: float) -> Tensor:
    """FlashAttention, and where it does not suit PyTorch's memory-efficient kernel."""
    if suits_flash_attention(q_NHE):
        return flash_attention(q_NHE, k_NHE, v_NHE, packing, probability)
    q, k, v = (packing.unpack(x_NHE).transpose(1, 2) for x_NHE in (q_NHE, k_NHE, v_NHE))
    y = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, probability)[0]
    return packing.pack(y.transpose(1, 2))


def _dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """As on a GPU: keeps a byte per element for the backward."""
    if not training or probability == 0.0:
        return x
    return torch.native_dropout(x, probability, True)[0]


def run_fake(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on fake tensors, which refuse to draw from a generator and to read the lengths of a CTC loss."""
    if function is torch.ops.aten._ctc_loss.Tensor:
        return _ctc_loss(*args[:2])
    if kwargs.get("generator") is not None:
        kwargs = {**kwargs, "generator": None}
    return function(*args, **kwargs)


def _ctc_loss(log_probabilities_TBV: Tensor, labels_L: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each utterance, and what is kept for the backward, where all have equally many labels."""
    frames, batch, _ = log_probabilities_TBV.shape
    states = 2 * -(-labels_L.shape[0] // batch) + 1
    return log_probabilities_TBV.new_empty(batch), log_probabilities_TBV.new_empty(batch, frames, states)


class _Watch(LiveMemory):
    """Notes the most memory up to each event, and adds up the seconds of all operations."""

    def __init__(self, model: nn.Module, speeds: Speeds) -> None:
        super().__init__()
        self.speeds = speeds
        self.seconds = {False: 0.0, True: 0.0}  # of the forward, of the backward
        self.moments: list[Moment] = []
        self.in_backward = False
        names = unit_names(model)
        self.rest = self.unit = len(names)
        for number, name in enumerate(names):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, number=number: self._enter(number))
            module.register_forward_hook(lambda *_: self._enter(self.rest))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                unit = unit_of(name, names)
                parameter.register_post_accumulate_grad_hook(lambda owner, unit=unit: self._gradient(owner, unit))

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.namespace == "prim":  # asks for the device of a tensor, which is half of all calls
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)

    def call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> Any:
        result = run_fake(function, args, kwargs)
        places = {one.untyped_storage()._cdata for one in given}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        new = [one for one in made if one.untyped_storage()._cdata not in places]
        if new or function._schema.is_mutable:  # not a view
            flops = flops_of(function, args, kwargs, result)
            self.seconds[self.in_backward] += seconds_of(flops, [*given, *new], self.speeds)
        return result

    def end(self, unit: int, gradient: int = 0) -> None:
        """End a moment of `unit`."""
        self.moments.append(Moment(unit, self.in_backward, gradient, float(self.peak)))
        self.peak = self.live

    def _enter(self, unit: int) -> None:
        self.end(self.unit)
        self.unit = unit

    def _gradient(self, parameter: nn.Parameter, unit: int) -> None:
        parameter.grad = None  # it is the engine that keeps gradients
        self.unit = unit
        self.end(unit, parameter.numel())
