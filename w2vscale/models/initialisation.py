"""Initial values of a model's parameters, module by module, so that a large model never exists whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def initial_parameters(model: nn.Module, seed_of: Callable[[int], int]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and initial value (fp32, on the CPU).

    `model` is on the meta device and is used up. `seed_of(i)` seeds the draws of the i-th module that has
    parameters of its own: what a parameter starts from depends on the seed and the architecture alone.
    """
    owners = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    for index, (name, module) in enumerate(owners):
        module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(index))
            module.reset_parameters()
        for own, parameter in list(module.named_parameters(recurse=False)):
            yield f"{name}.{own}" if name else own, parameter.detach()
        module.to_empty(device="meta", recurse=False)
