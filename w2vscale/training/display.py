"""Console output of a training run: a progress bar on a terminal, and log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich import progress

from w2vscale.terminal import VisibleConsole


class Display:
    """Prints the progress bar and log lines; silent unless `enabled` (on rank 0)."""

    def __init__(self, *, total: int, enabled: bool) -> None:
        self.console = VisibleConsole(stderr=False, soft_wrap=True, highlight=False)
        self.enabled = enabled
        self.total = total
        self._progress = progress.Progress(
            progress.TextColumn("[bold]update"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[rates]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
            transient=True,
        )

    @contextmanager
    def updating(self, start: int) -> Iterator[None]:
        """Show the progress bar during the block, which runs the updates from `start` on."""
        self._began = (start, time.monotonic())
        self._task = self._progress.add_task("", total=self.total, completed=start, rates="")
        with self._progress:
            yield

    def message(self, text: str, style: str = "") -> None:
        """Print one line."""
        if self.enabled:
            self.console.print(text, style=style, markup=False)

    def advance(self, update: int) -> None:
        """Move the progress bar to `update`."""
        self._progress.update(self._task, completed=update)

    def training(self, update: int, line: str, values: Mapping[str, float]) -> None:
        """Print the training metrics: the objective's own `line`, then those common to all objectives."""
        rate = f"{values['audio_seconds_per_second']:.0f} s/s"
        self._progress.update(self._task, completed=update, rates=rate)
        self.message(
            f"update {update}/{self.total}  {line}"
            f"  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  {rate}"
            f"  {values['hours_seen']:.2f} h seen  {self._left(update)} left"
        )

    def validation(self, update: int, line: str) -> None:
        """Print the validation metrics."""
        self.message(f"update {update}/{self.total}  validation: {line}", style="bold")

    def _left(self, update: int) -> str:
        start, began = self._began
        seconds = (time.monotonic() - began) / max(update - start, 1) * (self.total - update)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
