"""Fused AdamW over parameter groups that are chosen by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w2vscale.config.tree import OptimConfig
from w2vscale.errors import UserError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their settings; `lr_scale` multiplies the schedule's learning rate."""

    names: list[str]
    lr_scale: float
    weight_decay: float


def parameter_groups(shapes: Sequence[tuple[str, torch.Size]], config: OptimConfig) -> list[ParameterGroup]:
    """Sort parameters, given by name and shape, into groups.

    Each of `optim.groups` takes what its pattern finds (`re.search`) and no earlier one took. Weight decay falls
    on matrices only: parameters with at least two dimensions above 1.

    Raises:
        UserError: a pattern that finds no parameter.
    """
    settings: dict[tuple[float, float], list[str]] = {}
    found = [False] * len(config.groups)
    for name, shape in shapes:
        lr_scale, weight_decay = 1.0, config.weight_decay
        for index, group in enumerate(config.groups):
            if re.search(group.pattern, name):
                found[index] = True
                lr_scale = group.lr_scale
                weight_decay = config.weight_decay if group.weight_decay is None else group.weight_decay
                break
        if sum(size > 1 for size in shape) < 2:
            weight_decay = 0.0
        settings.setdefault((lr_scale, weight_decay), []).append(name)
    for index, group in enumerate(config.groups):
        if not found[index]:
            raise UserError(
                f"optim.groups.{index}.pattern={group.pattern!r}: finds no parameter (or none that an earlier "
                f"pattern left); names look like {shapes[0][0]}"
            )
    return [ParameterGroup(names, *key) for key, names in settings.items()]


def make_adamw(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: OptimConfig
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019), without state yet."""
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.names],
                "lr_scale": group.lr_scale,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def allocate_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """AdamW's state of `parameters` before its first step, so that saving and loading never depend on which of them
    have had a gradient."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def state_of(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> Mapping[str, Tensor]:
    """What AdamW keeps of the parameter `name`.

    Raises:
        RuntimeError: `allocate_state` was not given this very tensor. The optimizer itself would invent an empty state.
    """
    if parameter not in optimizer.state:
        raise RuntimeError(f"{name}: the optimizer has no state of this parameter")
    return optimizer.state[parameter]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the schedule's learning rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
