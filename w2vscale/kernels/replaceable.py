"""How an operation with the decorator `@replaceable` finds its kernel: by its name and the device of its input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from w2vscale.errors import UserError
from w2vscale.kernels.table import KERNELS, Kernel

VARIABLE = "W2VSCALE_KERNELS"  # read at import: `plain` for no kernels, `fast` (the default) for those of the table


def kernels_of(choice: str) -> dict[tuple[str, str], Kernel]:
    """Return the kernels for a value of W2VSCALE_KERNELS. Raises UserError if there is no such choice."""
    if choice not in ("fast", "plain"):
        raise UserError(f"{VARIABLE}={choice}: choose fast or plain")
    return KERNELS if choice == "fast" else {}


_chosen: Mapping[tuple[str, str], Kernel] = kernels_of(os.environ.get(VARIABLE, "fast"))

P = ParamSpec("P")
R = TypeVar("R")


def replaceable(plain: Callable[P, R]) -> Callable[P, R]:
    """Compute `plain` by its kernel where there is one; the first argument is positional and a tensor."""
    name = plain.__name__

    @wraps(plain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        kernel = kernel_of(name, first.device.type)
        if kernel is not None and (kernel.traceable or not torch.compiler.is_compiling()):
            y: R = kernel.function(*args, **kwargs)
            if y is not NotImplemented:
                return y
        return plain(*args, **kwargs)

    return run


def kernel_of(operation: str, device_type: str) -> Kernel | None:
    """The kernel that may compute an operation on a type of device; None where the plain operation does."""
    return _chosen.get((operation, device_type))


def kernels(choice: str) -> AbstractContextManager[None]:
    """Use `fast` or `plain` operations inside, whatever the environment says (for tests and benchmarks)."""
    return using(kernels_of(choice))


@contextmanager
def using(table: Mapping[tuple[str, str], Kernel]) -> Iterator[None]:
    """Use the kernels of `table` inside."""
    global _chosen
    before, _chosen = _chosen, table
    try:
        yield
    finally:
        _chosen = before
