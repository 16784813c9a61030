"""Training objectives, one file each. `OBJECTIVES` is the only place that lists them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2vscale.objectives.base import Objective, StepContext, Sums, TransformersHead, add_sums
    from w2vscale.objectives.registry import (
        OBJECTIVES,
        Difference,
        all_settings,
        build_objective,
        differences,
        differing,
        load,
        resolve,
    )
    from w2vscale.objectives.settings import effective

_PLACES = {
    "base": ("Objective", "StepContext", "Sums", "TransformersHead", "add_sums"),
    "registry": (
        "OBJECTIVES",
        "Difference",
        "all_settings",
        "build_objective",
        "differences",
        "differing",
        "load",
        "resolve",
    ),
    "settings": ("effective",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: all but the settings needs PyTorch, which takes seconds.
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
