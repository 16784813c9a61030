"""w2vscale: scalable pretraining of wav2vec 2.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from w2vscale.version import __version__

if TYPE_CHECKING:
    from w2vscale.inference.pretrained import Pretrained, load

__all__ = ["Pretrained", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: torch takes seconds.
    if name in ("Pretrained", "load"):
        from w2vscale.inference import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
