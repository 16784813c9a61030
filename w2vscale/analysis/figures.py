"""Create and save matplotlib figures without pyplot, which keeps global state and may need a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from w2vscale.errors import UserError
from w2vscale.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure; its size is in inches."""
    from matplotlib.figure import Figure  # takes a second, and most commands draw nothing

    return Figure(figsize=(width, height))


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure to a file whose suffix names the format.

    Raises:
        UserError: the format is unknown, or the file cannot be written.
    """
    file_format = output.suffix.removeprefix(".").lower()
    if file_format not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{output}: not the name of an image file; use a suffix such as .png, .pdf or .svg")
    figure.tight_layout()
    with new_file(output, "wb") as file:
        figure.savefig(file, format=file_format, dpi=110)
