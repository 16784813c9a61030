"""What a run shows: a progress bar on a terminal, and lines, which also go to the log of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from rich import progress
from rich.text import Text

from w2vscale.objectives.base import Finding
from w2vscale.runtime import StopRequest
from w2vscale.terminal import LastingOutput, VisibleConsole, visible
from w2vscale.training.run_log import Event, RunLog
from w2vscale.training.summary import Start, hours

Verbosity = Literal["quiet", "normal", "verbose"]
WARNING = "warning: "
INDENT = 2
FORECAST = 60.0  # seconds; the duration of shorter runs is not announced
FORECAST_LINE = 2  # the line of metrics after which it is: the first one has the time of compilation


class TimeLeft(progress.ProgressColumn):
    """The time that a run takes yet; or that a stop signal has come, which may have to wait for the update to end."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self._stop = stop

    def render(self, task: progress.Task) -> Text:
        """Called in a thread of its own."""
        if self._stop.received is None and self._stop.arrived() is None:
            return Text(task.fields["left"])
        return Text("stopping after this update; Ctrl-C again ends at once", style="yellow")


class Display:
    """Shows the lines and the progress bar of a run on rank 0, and writes all lines to its log.

    quiet: only warnings, and why a run ended early. verbose: also details.
    """

    def __init__(
        self,
        *,
        total: int,
        enabled: bool,
        verbosity: Verbosity = "normal",
        run_log: RunLog | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        output: Any = LastingOutput(self._without_output)
        self.console = VisibleConsole(file=output, highlight=False)
        self.enabled = enabled
        self.verbosity = verbosity
        self.run_log = run_log if enabled else None
        self.total = total
        self._saved: int | None = None  # update of the newest checkpoint
        self._times: list[tuple[int, float]] = []  # update and time of training metrics
        self._lines = 0  # of training metrics since the start
        self._progress = progress.Progress(
            progress.TextColumn("update"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[rate]}"),
            TimeLeft(stop or StopRequest()),
            console=self.console,
            refresh_per_second=2,
            disable=not (enabled and self.console.is_terminal) or verbosity == "quiet",
            transient=True,
        )

    @contextmanager
    def updating(self, start: int) -> Iterator[None]:
        """Show the progress bar during the block, which runs the updates from `start` on."""
        self._reached(start)
        self._saved = start or None
        self._task = self._progress.add_task("", total=self.total, completed=start, rate="", left="")
        with self._progress:
            yield

    def message(self, text: str, style: str = "") -> None:
        """Show a line. One that begins with `warning: ` is also shown if the run is quiet, and is an event."""
        if not self.enabled:
            return
        if warning := text.startswith(WARNING):
            self._event("warning", text=text.removeprefix(WARNING))
        self._show(text, style or "yellow" * warning, always=warning)

    def important(self, text: str) -> None:
        """Show a line that is also shown if the run is quiet."""
        self._show(text, "yellow", always=True)

    def detail(self, text: str) -> None:
        """Show a line if the run is verbose. The log always has it."""
        self._show(text, "", shown=self.verbosity == "verbose")

    def finding(self, finding: Finding) -> None:
        """Show a warning about the health of the run."""
        self._event("health", kind=finding.kind, text=finding.text)
        self._show(WARNING + finding.text, "yellow", always=True)

    def went_back(self, update: int, text: str) -> None:
        """Show that the run went back to the checkpoint of `update`."""
        left_at = self._reached(update)
        self._event("roll_back", left_at=left_at, text=text)
        self._show(text, "yellow", always=True)
        self._times, self._saved = [], update

    def stopped(self, text: str, *, early: bool = False) -> None:
        """Show why the run ended before its last update. `early`: by early stopping, so that it is complete."""
        self._event("stop", text=text, early=early)
        self._show(text, "yellow", always=True)

    def finished(self, exp: Path, start: int) -> None:
        """Show that the run is complete; `start`: the update at which this process started."""
        if self.total > start:
            self.message(f"finished {self.total:,} updates; see w2vscale report {exp}")

    def starting(self, start: Start) -> None:
        """Show the first lines of a run."""
        self._reached(start.update)
        self._event("start", **start.event())
        width = max(len(name) for name, _ in start.rows()) + INDENT
        for name, text in start.rows():
            self._show(text, "", prefix=f"{name:{width}}")

    def advance(self, update: int, *, saved: int) -> None:
        """Move the progress bar to `update`. `saved`: the update of the newest checkpoint that is complete."""
        self._reached(update)
        if saved >= 0:
            self._saved = saved
        self._progress.update(self._task, completed=update)

    def training(self, update: int, line: str, values: Mapping[str, float]) -> None:
        """Show training metrics: the objective's own `line`, then those that all objectives have."""
        self._reached(update)
        left = self._seconds_left(update, values["updates_per_second"])
        rate = f"{values['audio_seconds_per_second']:,.0f}x real time"
        self._progress.update(self._task, completed=update, rate=rate, left=f"{duration(left)} left")
        fields = [
            f"update {update:,}/{self.total:,}",
            *line.split("  "),
            f"lr {values['lr']:.2e}",
            f"grad norm {values['grad_norm']:.2f}",
            rate,
            *([f"MFU {values['mfu']:.1%}"] if "mfu" in values else []),
            f"data wait {values['data_wait_fraction']:.0%}",
            f"memory {values['peak_memory_gib']:.1f} GiB",
            f"{hours(values['hours_seen'])} seen",
            f"checkpoint {self._saved:,}" if self._saved is not None else "no checkpoint",
            *([f"{duration(left)} left"] if left else []),
        ]
        self._show("  ".join(fields), "")
        self._lines += 1
        if self._lines == FORECAST_LINE and left >= FORECAST:
            end = datetime.now().astimezone() + timedelta(seconds=left)
            self.message(
                f"expected duration: {duration(left)} for the next {self.total - update:,} updates, until "
                f"{end:%a %d %b %Y, %H:%M %Z}"
            )

    def validation(self, update: int, line: str, name: str = "validation") -> None:
        """Show validation metrics."""
        self._show(f"update {update:,}/{self.total:,}  {name}: {line}", "bold")

    def _reached(self, update: int) -> int:
        """Note the newest update. Return the one before."""
        if self.run_log is None:
            return update
        before, self.run_log.update = self.run_log.update, update
        return before

    def _event(self, name: Event, **values: object) -> None:
        if self.run_log is not None:
            self.run_log.event(name, **values)

    def _show(self, line: str, style: str, *, prefix: str = "", always: bool = False, shown: bool = True) -> None:
        """Write a line to the log, and print it if the verbosity allows. On a terminal it wraps between words."""
        if self.run_log is not None:
            self.run_log.line(prefix + line)
        if not (self.enabled and shown and (always or self.verbosity != "quiet")):
            return
        line = visible(line)
        text = wrapped(line, self.console.width, prefix) if self.console.is_terminal else prefix + line
        self.console.print(Text(text, style=style), soft_wrap=True)

    def _without_output(self, reason: str) -> None:
        if self.run_log is not None:
            self.run_log.line(f"warning: standard output cannot be written ({reason}); training goes on, see this log")

    def _seconds_left(self, update: int, updates_per_second: float) -> float:
        """Forecast from the time of the second half of the training metrics, which includes validation and saving."""
        now = monotonic()
        self._times.append((update, now))
        start, began = self._times[(len(self._times) - 1) // 2]
        if start < update:
            updates_per_second = (update - start) / (now - began)
        return (self.total - update) / updates_per_second


def wrapped(line: str, width: int, prefix: str = "") -> str:
    """Break a line after `prefix` into lines of at most `width` characters, the later ones indented.

    Breaks between fields, which are separated by two spaces, where a field fits into a line; else between words. A word
    that is longer than a line, such as a path, stays whole.
    """
    indent = " " * (len(prefix) or INDENT)
    pieces: list[tuple[str, str]] = []  # what separates a piece from the one before, and the piece
    for field in line.split("  "):
        words = [field] if len(field) <= width - len(indent) else field.split(" ")
        pieces += [("  ", words[0]), *((" ", word) for word in words[1:])]
    lines = [prefix + pieces[0][1]]
    for separator, piece in pieces[1:]:
        if len(lines[-1]) + len(separator) + len(piece) <= width:
            lines[-1] += separator + piece
        else:
            lines.append(indent + piece)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format a duration: `1:02:03`, or `3 d 04:05` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02d}:{minute:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"
