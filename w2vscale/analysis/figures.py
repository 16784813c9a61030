"""How pictures are drawn and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2vscale.errors import UserError


def import_pyplot() -> Any:
    """matplotlib.pyplot without a window. It takes a second to import, and most commands draw nothing."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure, and the folders above it, and forget it.

    Raises:
        UserError: the file cannot be written.
    """
    figure.tight_layout()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        import_pyplot().close(figure)
