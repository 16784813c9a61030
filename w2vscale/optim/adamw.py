"""Fused AdamW, with parameter groups selected by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2vscale.config.tree import OptimConfig, ParameterGroupConfig
from w2vscale.errors import UserError
from w2vscale.optim.ema import AVERAGE


class ParameterGroup(NamedTuple):
    """Parameters with the same optimizer settings; `lr_scale` multiplies the scheduled learning rate."""

    names: list[str]
    lr_scale: float
    weight_decay: float


def parameter_groups(shapes: Sequence[tuple[str, torch.Size]], config: OptimConfig) -> list[ParameterGroup]:
    """Sort parameters, given as (name, shape), into groups. UserError if a pattern selects no parameter.

    A parameter takes its settings from the first entry of `optim.groups` with a matching pattern (`re.search`). The
    weight decay of an entry applies to all of its parameters. `optim.weight_decay` applies to matrices, which have at
    least two dimensions greater than 1, and with `optim.decay_vectors` to all parameters.
    """
    entries = [*config.groups, ParameterGroupConfig(pattern="")]  # the last one matches every name
    selecting = set()
    settings: dict[tuple[float, float], list[str]] = {}
    for name, shape in shapes:
        index, entry = next(each for each in enumerate(entries) if re.search(each[1].pattern, name))
        selecting.add(index)
        weight_decay = entry.weight_decay
        if weight_decay is None:
            is_matrix = sum(size > 1 for size in shape) >= 2
            weight_decay = config.weight_decay if is_matrix or config.decay_vectors else 0.0
        settings.setdefault((entry.lr_scale, weight_decay), []).append(name)
    for index, entry in enumerate(config.groups):
        if index not in selecting:
            raise UserError(
                f"optim.groups.{index}.pattern={entry.pattern!r}: finds no parameter, or only parameters that an "
                f"earlier pattern finds; names look like {shapes[0][0]}"
            )
    return [ParameterGroup(names, *key) for key, names in settings.items()]


def make_adamw(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: OptimConfig
) -> torch.optim.AdamW:
    """Create a fused AdamW (Loshchilov & Hutter 2019). It has no state yet: see `allocate_state`."""
    options = [
        {"params": [parameters[name] for name in names], "lr_scale": lr_scale, "weight_decay": weight_decay}
        for names, lr_scale, weight_decay in groups
    ]
    return torch.optim.AdamW(options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def allocate_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], *, average: bool = False) -> None:
    """Allocate the AdamW state of all `parameters` before the first step, and with `average` their moving average.

    Then saving and loading do not depend on which parameters have already received a gradient.
    """
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        if average:
            optimizer.state[parameter][AVERAGE] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def state_of(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> Mapping[str, Tensor]:
    """Return the AdamW state of `parameter`. RuntimeError if `allocate_state` was not called with this very tensor."""
    if parameter not in optimizer.state:  # `optimizer.state[parameter]` would silently create an empty state
        raise RuntimeError(f"{name}: the optimizer has no state for this parameter")
    return optimizer.state[parameter]


def clip_and_step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float | None) -> None:
    """Step fused AdamW with gradients clipped to `max_norm`; if their `norm` is not finite, change nothing.

    `norm` is their global L2 norm before clipping, a scalar. The host need not know it: the fused kernel divides the
    gradients by `grad_scale`, and does nothing if `found_inf` is 1, as with torch.amp.GradScaler.
    """
    fused: Any = optimizer
    fused.found_inf = (~norm.isfinite()).float()
    fused.grad_scale = None if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times the scale of the group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
