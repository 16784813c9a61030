"""Building a model without memory for its parameters, and its initial values module by module.

So a large model never exists whole in one place. What it starts from depends on the seed and the architecture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


class NoDraws(TorchFunctionMode):
    """Inside the block nothing is drawn into tensors on the meta device.

    They have no values, and PyTorch would import torch._dynamo for it, which takes seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else named["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **named)


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside the block new modules have parameters on the meta device. Buffers hold their values as usual."""

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)
    try:
        with NoDraws():
            yield
    finally:
        handle.remove()


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give empty parameters memory on a device, without values, and move buffers with their values there."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}  # modules may share a parameter
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in allocated:
                    values = torch.empty_like(parameter, device=device)
                    allocated[parameter] = nn.Parameter(values, parameter.requires_grad)
                module._parameters[name] = allocated[parameter]
    model.to(device)


@torch.no_grad()
def initial_values(
    model: nn.Module, seed_of: Callable[[int], int], *, without: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Name and initial value of every parameter and persistent buffer, on the CPU. Those in `without` are left out.

    `model` was built with `empty_parameters` and is used up. A module with parameters of its own draws them in
    `reset_parameters`, which may also set its buffers. The i-th module with parameters or buffers draws from
    `seed_of(i)`.
    Raises TypeError if a module has parameters and no `reset_parameters`.
    """
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if any(value is not None for value in (*module._parameters.values(), *module._buffers.values()))
    ]
    for index, (name, module) in enumerate(owners):
        prefix = f"{name}." if name else ""
        if all(f"{prefix}{own}" in without for own in _own_values(module)):
            continue
        parameters = {own: value for own, value in module._parameters.items() if value is not None}
        for own, parameter in parameters.items():
            module._parameters[own] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
        if hasattr(module, "reset_parameters"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(index))
                module.reset_parameters()
        elif parameters:
            raise TypeError(
                f"{name}: {type(module).__name__} has parameters and no reset_parameters to initialise them"
            )
        for own, value in _own_values(module).items():
            if f"{prefix}{own}" not in without:
                yield f"{prefix}{own}", value.detach()
        module._parameters.update(parameters)


def _own_values(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module itself, without those of its children."""
    buffers = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: value for name, value in {**module._parameters, **buffers}.items() if value is not None}
