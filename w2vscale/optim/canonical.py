"""What a checkpoint of a model must hold: the name, shape and type of every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state with the shape of the parameter; `step` is one value."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


Specs = Mapping[str, TensorSpec]
"""Specs by canonical name: `model.<name>`, `optim.<name>.{exp_avg,exp_avg_sq,step}`."""


def expected_tensors(model: nn.Module, *, optimizer: bool = True) -> dict[str, TensorSpec]:
    """Every tensor in a checkpoint of `model`, which may be on the meta device.

    These are its parameters and persistent buffers, in the order of its `state_dict`, and with `optimizer` AdamW's
    state of each parameter that requires a gradient. A parameter that has several names counts under its first.
    """
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    specs: dict[str, TensorSpec] = {}
    for name in model.state_dict():
        if name in parameters:
            shape = tuple(parameters[name].shape)
            specs[f"model.{name}"] = TensorSpec(shape)
            if optimizer and parameters[name].requires_grad:
                specs |= {f"optim.{name}.{key}": TensorSpec(shape) for key in MOMENTS}
                specs[f"optim.{name}.step"] = TensorSpec(())
        elif name in buffers:
            specs[f"model.{name}"] = TensorSpec(tuple(buffers[name].shape), stored_dtype(buffers[name].dtype))
    return specs


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that values of `dtype` have in a checkpoint: fp32 if floating-point, otherwise their own."""
    return torch.float32 if dtype.is_floating_point else dtype


def stored(tensor: Tensor) -> Tensor:
    """A tensor in the type that its values have in a checkpoint: itself if it has that type."""
    return tensor.to(stored_dtype(tensor.dtype))


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Shape and type of each tensor, of DTensors as a whole."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def model_only(specs: Specs) -> dict[str, TensorSpec]:
    """The specs of the model's own tensors, without those of the optimizer."""
    return {name: spec for name, spec in specs.items() if name.startswith("model.")}


def model_shapes(specs: Specs) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors, by the model's own names."""
    return {name.removeprefix("model."): spec.shape for name, spec in model_only(specs).items()}


def has_optimizer_state(names: Iterable[str]) -> bool:
    """Whether any of these names is of optimizer state. Imported and averaged checkpoints have none."""
    return any(name.startswith("optim.") for name in names)


def differences(found: Specs, expected: Specs) -> Iterator[str]:
    """Each tensor that is missing from `found`, has another shape or type, or is not expected: one line each."""
    for name, spec in expected.items():
        if name not in found:
            yield f"{name}: missing"
        elif found[name].shape != spec.shape:
            yield f"{name}: has the shape {list(found[name].shape)}, expected {list(spec.shape)}"
        elif found[name].dtype != spec.dtype:
            yield f"{name}: has the type {type_name(found[name].dtype)}, expected {type_name(spec.dtype)}"
    for name in found:
        if name not in expected:
            yield f"{name}: not a tensor of the model or its optimizer"


def optimizer_problem(found: Specs, expected: Specs) -> str | None:
    """Why the optimizer state in `found` is not the one that resuming a run needs, or None."""
    found = {name: spec for name, spec in found.items() if name.startswith("optim.")}
    expected = {name: spec for name, spec in expected.items() if name.startswith("optim.")}
    if expected and not found:
        return "it holds no optimizer state"
    missing = [name for name in expected if name not in found]
    if missing:
        of = {name.removeprefix("optim.").rpartition(".")[0] for name in missing}
        return (
            f"its optimizer state is incomplete ({counted(len(missing), 'tensor')} of {counted(len(of), 'parameter')} "
            f"{'is' if len(missing) == 1 else 'are'} missing, e.g. {missing[0]})"
        )
    wrong = next(differences(found, expected), None)
    return f"its optimizer state does not fit its model ({wrong})" if wrong else None


def type_name(dtype: torch.dtype) -> str:
    """A type without its library: `float32`."""
    return str(dtype).removeprefix("torch.")


def counted(count: int, noun: str) -> str:
    """A number and its noun, with an s unless it is one."""
    return f"{count} {noun}{'s' * (count != 1)}"
