"""w2vscale: scalable pretraining of wav2vec 2.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2vscale.evaluation.pretrained import Pretrained, load

__version__ = "0.1.0"
__all__ = ["Pretrained", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: torch takes seconds.
    if name in ("Pretrained", "load"):
        from w2vscale.evaluation import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
