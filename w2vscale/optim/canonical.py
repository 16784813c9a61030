"""Canonical checkpoint contents: the name, shape and dtype of every tensor that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from w2vscale.errors import counted

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, in the shape of the parameter; `step`, the third, is a scalar


class TensorSpec(NamedTuple):
    """Shape and dtype of a whole (unsharded) tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Described(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


Specs = Mapping[str, TensorSpec]
"""Specs by canonical name: `model.<name>`, `optim.<name>.{exp_avg,exp_avg_sq,step}`, `ema.<name>`."""


def expected_tensors(model: nn.Module, *, optimizer: bool = True, average: bool = False) -> dict[str, TensorSpec]:
    """List the tensors in a checkpoint of `model`, which may be on the meta device.

    These are its parameters and persistent buffers, in `state_dict` order, and of each parameter that requires a
    gradient, the AdamW state with `optimizer` and the moving average with `average`. A shared parameter appears once,
    under its first name.
    """
    parameters = dict(model.named_parameters())
    unique = parameters | dict(model.named_buffers())
    specs: dict[str, TensorSpec] = {}
    for name in model.state_dict():
        if name in unique:
            shape = tuple(unique[name].shape)
            specs[f"model.{name}"] = TensorSpec(shape, stored_dtype(unique[name].dtype))
            trained = name in parameters and parameters[name].requires_grad
            if optimizer and trained:
                specs |= {f"optim.{name}.{key}": TensorSpec(shape) for key in MOMENTS}
                specs[f"optim.{name}.step"] = TensorSpec(())
            if average and trained:
                specs[f"ema.{name}"] = TensorSpec(shape)
    return specs


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of `dtype` have in a checkpoint: fp32 if floating-point, otherwise `dtype`."""
    return torch.float32 if dtype.is_floating_point else dtype


def stored(tensor: Tensor) -> Tensor:
    """Convert a tensor to its checkpoint dtype; returns the tensor itself if it already has it."""
    return tensor.to(stored_dtype(tensor.dtype))


def specs_of(tensors: Mapping[str, Described]) -> dict[str, TensorSpec]:
    """Return the shape and dtype of each tensor; a DTensor counts with its global shape."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def model_only(specs: Specs) -> dict[str, TensorSpec]:
    """Return the specs of the model tensors, without the optimizer state."""
    return {name: spec for name, spec in specs.items() if name.startswith("model.")}


def model_shapes(specs: Specs) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model tensors, by `state_dict` name."""
    return {name.removeprefix("model."): spec.shape for name, spec in model_only(specs).items()}


def has_optimizer_state(names: Iterable[str]) -> bool:
    """Return whether any name belongs to optimizer state. Imported and averaged checkpoints have none."""
    return any(name.startswith("optim.") for name in names)


def has_average(names: Iterable[str]) -> bool:
    """Return whether any name belongs to the moving average of the parameters (`optim.ema_decay`)."""
    return any(name.startswith("ema.") for name in names)


def differences(found: Specs, expected: Specs) -> Iterator[str]:
    """Yield one line for each tensor that is missing, has the wrong shape or dtype, or is not expected."""
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
    """Explain why a run cannot be resumed from the optimizer state in `found`; None if it can."""
    found, expected = (
        {name: spec for name, spec in specs.items() if name.startswith("optim.")} for specs in (found, expected)
    )
    if expected and not found:
        return "it holds no optimizer state"
    if missing := [name for name in expected if name not in found]:
        parameters = {name.rpartition(".")[0] for name in missing}
        which = f"{counted(len(missing), 'tensor')} of {counted(len(parameters), 'parameter')}"
        are = "is" if len(missing) == 1 else "are"
        return f"its optimizer state is incomplete ({which} {are} missing, e.g. {missing[0]})"
    wrong = next(differences(found, expected), None)
    return f"its optimizer state does not fit its model ({wrong})" if wrong else None


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the prefix "torch.", e.g. `float32`."""
    return str(dtype).removeprefix("torch.")
