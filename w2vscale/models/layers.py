"""Linear, LayerNorm and dropout.

Parameters are kept in fp32 and cast to the input's type where they are used: the type of the waveforms decides in which
type a model computes. Inside `weights_cast_once` all forwards share one copy. Each module's `reset_parameters` draws
the initial values of its own parameters (not those of its children), so that a model can be built on the meta device
and filled module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config.running import PrecisionConfig
from w2vscale.kernels.precision import cast, widen
from w2vscale.kernels.replaceable import replaceable


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The type of activations and matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.compute]


class Linear(nn.Linear):
    """nn.Linear in the type of the input. `init` draws the initial weights, with biases of 0; default: nn.Linear's."""

    def __init__(self, inputs: int, outputs: int, *, init: Callable[[Tensor], Tensor] | None = None) -> None:
        self.init = init
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        if self.init is None:
            super().reset_parameters()
        else:
            self.init(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.weight, x.dtype), cast(self.bias, x.dtype))


@contextmanager
def weights_cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the parameters of Linear and LayerNorm once for all forwards inside, which must not change them."""
    parameters = cast_parameters(model, dtype)
    copies = [torch.empty_like(parameter, dtype=dtype, requires_grad=False) for parameter in parameters]
    if parameters:
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.cast_copy = copy  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.cast_copy  # type: ignore[attr-defined]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return the parameters that `weights_cast_once` copies."""
    modules = [module for module in model.modules() if isinstance(module, Linear | LayerNorm)]
    # By identity, because modules may share a parameter.
    of_modules = dict.fromkeys(parameter for module in modules for parameter in module.parameters(recurse=False))
    return [parameter for parameter in of_modules if parameter.dtype != dtype]


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016) over the last dimension, computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@replaceable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension in fp32, rounded to the type of `x`.

    In bf16 the sums over frames, which are the gradients of `weight` and `bias`, would soon stand still.
    """
    return F.layer_norm(widen(x), x.shape[-1:], widen(weight), widen(bias), eps).to(x.dtype)


@replaceable
def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with `probability` and scale the others by 1 / (1 - probability), in training alone."""
    return F.dropout(x, probability, training)
