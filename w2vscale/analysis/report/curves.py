"""What the plots of a report show: lines, chance levels and marks, before they are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from w2vscale.analysis.report.reading import Record, Run
from w2vscale.objectives.base import Panel, Published

Floats = NDArray[np.float64]
T = TypeVar("T")
Split = Literal["training", "validation", "further"]  # the last one: a further validation set
LARGEST = 1e30  # of a value that is drawn; the inverse is the smallest besides 0
MOST_MARKS = 50  # of a run

# Metrics of every objective: title, axis, key, whether the axis is logarithmic.
COMMON = (
    ("gradient norm", "L2 norm before clipping", "grad_norm", True),
    ("learning rate", "of the optimizer", "lr", False),
    ("throughput", "seconds of audio per second", "audio_seconds_per_second", False),
)


@dataclass(frozen=True)
class Line:
    """One curve. NaN is a gap."""

    run: int  # position among the runs
    name: str  # what it is, besides the run: a part of a metric, or a further validation set
    split: Split
    number: int  # among the curves of this run and split in this plot
    updates: Floats
    hours: Floats
    values: Floats

    def title(self, run_names: Sequence[str]) -> str:
        """The run and what the line is of it."""
        split = "validation" if self.split == "further" else self.split
        return ", ".join(filter(None, (run_names[self.run], self.name, split)))


@dataclass(frozen=True)
class Plot:
    """One plot of the report."""

    title: str
    label: str  # what is plotted, with its unit
    lines: list[Line]
    chance: list[float]
    published: list[Published]
    logarithmic: bool = False
    percent: bool = False

    @property
    def last_update(self) -> float:
        """The last update of any line."""
        return max((float(line.updates.max()) for line in self.lines if len(line.updates)), default=0.0)

    def beyond(self, published: Published) -> bool:
        """Whether published values are so far ahead of the runs that their curves would be too short to be read."""
        return self.last_update < 0.5 * min(published.values)


@dataclass(frozen=True)
class Mark:
    """A point in the life of a run, in all plots."""

    run: int
    update: float
    hours: float
    text: str
    went_back: bool  # a roll back; otherwise a warning


def plots(runs: Sequence[Run], *, published: bool) -> list[Plot]:
    """The plots of several runs: the panels of their objectives by title, then what all objectives have.

    Plots in which nothing was measured are left out.
    """
    by_title: dict[str, list[tuple[int, Panel]]] = {}
    for number, run in enumerate(runs):
        for panel in run.panels:
            by_title.setdefault(panel.title, []).append((number, panel))
    found = [_panel_plot(title, panels, runs, published=published) for title, panels in by_title.items()]
    for title, label, key, logarithmic in COMMON:
        lines = [_line(run.train, key, number, "training", "", 0) for number, run in enumerate(runs)]
        found.append(Plot(title, label, lines, [], [], logarithmic))
    return [plot for plot in found if any(np.isfinite(line.values).any() for line in plot.lines)]


def _panel_plot(title: str, panels: Sequence[tuple[int, Panel]], runs: Sequence[Run], *, published: bool) -> Plot:
    lines = [line for number, panel in panels for line in _lines(runs[number], number, panel)]
    references = [panel.published for _, panel in panels if published and panel.published is not None]
    return Plot(
        title=title,
        label=" · ".join(_distinct(panel.label for _, panel in panels)),
        lines=lines,
        chance=_distinct(panel.chance for _, panel in panels if panel.chance is not None),
        published=references[:1],
        percent=all(panel.percent for _, panel in panels),
    )


def _lines(run: Run, number: int, panel: Panel) -> Iterable[Line]:
    """Training and all validations of a metric; of several metrics in one panel, training only."""
    for position, (key, name) in enumerate(panel.keys.items()):
        if panel.training:
            yield _line(run.train, key, number, "training", name, position)
        if not name:
            yield _line(run.validation, key, number, "validation", name, position)
            for place, (further, records) in enumerate(run.further.items()):
                yield _line(records, key, number, "further", further, place)


def _line(records: Sequence[Record], key: str, run: int, split: Split, name: str, position: int) -> Line:
    updates, hours, values = (
        np.array([np.nan if (value := record.get(each)) is None else float(value) for record in records])
        for each in ("update", "hours_seen", key)
    )
    order = np.argsort(updates, kind="stable")
    return Line(run, name, split, position, updates[order], drawable(hours)[order], drawable(values)[order])


def drawable(values: Floats) -> Floats:
    """Values with NaN for those that are too large to calculate with, and 0 for those that are too small."""
    size = np.abs(values)
    return np.where(size < LARGEST, np.where(size > 1 / LARGEST, values, 0.0), np.nan)


def marks(runs: Sequence[Run]) -> list[Mark]:
    """Where runs went back, and where something was wrong with them."""
    found = []
    for number, run in enumerate(runs):
        updates, hours = (np.array([float(record[key]) for record in run.train]) for key in ("update", "hours_seen"))
        backs = [(update, "went back to this checkpoint", True) for update in _distinct(run.roll_backs)]
        warnings = [
            (event.update, f"{event.title}: {event.text}", False)
            for event in run.events.distinct()
            if event.kind in ("health", "warning")
        ]
        for update, text, went_back in [*backs[-MOST_MARKS:], *warnings[-MOST_MARKS:]]:
            at = float(np.interp(update, updates, hours))
            found.append(Mark(number, float(update), at, text, went_back))
    return found


def thin(x: Floats, y: Floats, columns: int) -> NDArray[np.int64]:
    """Positions to draw of a long line: in each of `columns` equal parts of x the first, the smallest, the largest and
    the last value, so that no spike is lost (Jugel et al. 2014, M4). x must not decrease."""
    if len(x) <= 4 * columns:
        return np.arange(len(x))
    part = ((x - x[0]) / max(x[-1] - x[0], 1e-9) * columns).astype(np.int64).clip(max=columns - 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    kept: set[int] = set()
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True):
        values = y[start:end]
        kept |= {start, end - 1}
        if np.isfinite(values).any():
            kept |= {start + int(np.nanargmin(values)), start + int(np.nanargmax(values))}
    return np.array(sorted(kept), dtype=np.int64)


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
