"""w2vscale: scalable pretraining of wav2vec 2.0."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from w2vscale.version import __version__

if TYPE_CHECKING:
    from w2vscale.errors import UserError
    from w2vscale.inference.pretrained import Pretrained, load
    from w2vscale.runs import Run, train

__all__ = ["Pretrained", "Run", "UserError", "__version__", "load", "train"]

_PLACES = {
    "Pretrained": "w2vscale.inference.pretrained",
    "load": "w2vscale.inference.pretrained",
    "Run": "w2vscale.runs",
    "train": "w2vscale.runs",
    "UserError": "w2vscale.errors",
}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: torch takes seconds.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
