"""Draws plots as SVG, whose colours and line styles are in style.css. Every run has a colour, a dash and a marker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from w2vscale.analysis.report.curves import Floats, Line, Mark, Plot, thin
from w2vscale.analysis.report.html import Html, element, join
from w2vscale.analysis.report.scales import Scale, scale_of, short, spread, tick
from w2vscale.objectives.base import Published

WIDTH, HEIGHT = 380, 230  # in pixels; the text is readable down to 320
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 32  # margins
MOST_NAMES, LONGEST_NAME = 12, 14  # beside the ends of lines; characters
CHARACTER, LINE_HEIGHT = 6.6, 12.0  # of these names
COLUMNS = 250  # of a long line, see `thin`
MOST_MARKERS = 30  # of a line
STYLES = 8  # runs with a style of their own, in style.css
Axis = Literal["updates", "hours"]

MARKERS = (
    "M{x:.1f} {y:.1f}m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0z",  # circle
    "M{x:.1f} {y:.1f}m-2.4 -2.4h4.8v4.8h-4.8z",  # square
    "M{x:.1f} {y:.1f}m0 -3.2l3 5.4h-6z",  # triangle
    "M{x:.1f} {y:.1f}m0 -3.4l3.4 3.4l-3.4 3.4l-3.4 -3.4z",  # diamond
)


def draw(plot: Plot, marks: Sequence[Mark], run_names: Sequence[str], axis: Axis) -> Html:
    """Draw a plot over updates or hours seen."""
    published = [one for one in plot.published if axis == "updates" and not plot.beyond(one)]
    # A plot with published values reaches to the first one that the runs have not reached.
    last = max(float(_x(line, axis).max()) for line in plot.lines if len(line.updates))
    ahead = [min((at for at in one.values if at >= last), default=max(one.values)) for one in published]
    furthest = max(last, *ahead) if ahead else last
    named = _named(plot)
    longest = max([len(_name(line)) for line in named] + [len("chance")] * bool(plot.chance), default=0)
    x = Scale(0.0, furthest if furthest > 0.0 else 1.0, LEFT, round(WIDTH - RIGHT - CHARACTER * longest))
    shown = [{at: value for at, value in one.values.items() if at <= x.high} for one in published]
    everything = [line.values for line in plot.lines]
    everything += [np.array([*plot.chance, *(value for values in shown for value in values.values())])]
    y = scale_of(np.concatenate(everything), HEIGHT - BOTTOM, TOP, logarithmic=plot.logarithmic)
    return element(
        "svg",
        _grid(x, y, "updates" if axis == "updates" else "hours seen", percent=plot.percent),
        *_chance(plot.chance, x, y),
        *(_mark(mark, x, axis, run_names) for mark in marks if mark.run in {line.run for line in plot.lines}),
        *(_line(line, x, y, axis, run_names) for line in plot.lines),
        *(_published(one, values, x, y) for one, values in zip(published, shown, strict=True)),
        _names(named, plot.chance, x, y),
        class_=f"chart by-{axis}",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=_description(plot, run_names, axis),
        data_x=f"{x.low:g} {x.high:g} {x.start:g} {x.end:g}",
        data_y=f"{y.low:.6g} {y.high:.6g} {y.start:g} {y.end:g}",
        data_log=y.logarithmic,
        data_percent=plot.percent,
    )


def sample(number: int) -> Html:
    """A short line in the style of a run, for the legend."""
    marker = element("path", d=MARKERS[number % len(MARKERS)].format(x=17, y=6), class_="marker")
    return element(
        "svg",
        element("g", element("path", d="M0 6H34", class_="validation"), marker, class_=style(number)),
        class_="sample",
        viewBox="0 0 34 12",
        aria_hidden="true",
    )


def style(number: int) -> str:
    """The classes of what belongs to a run."""
    return f"run-{number} style-{number % STYLES}"


def _x(line: Line, axis: Axis) -> Floats:
    return line.updates if axis == "updates" else line.hours


def _grid(x: Scale, y: Scale, label: str, *, percent: bool) -> Html:
    parts = []
    heights = y.ticks(4)
    for value, at in zip(heights, y.place(np.array(heights)), strict=True):
        parts.append(element("path", d=f"M{x.start:g} {at:.1f}H{x.end:g}"))
        parts.append(
            element("text", tick(value, percent=percent), x=x.start - 6, y=round(float(at) + 3.5, 1), class_="end")
        )
    places = x.ticks(4)
    for value, at in zip(places, x.place(np.array(places)), strict=True):
        side = "end" if at > x.end - 12 else "middle"
        parts.append(element("text", short(value), x=round(float(at), 1), y=y.start + 14, class_=side))
    parts.append(element("path", d=f"M{x.start:g} {y.start:g}H{x.end:g}", class_="axis"))
    parts.append(element("text", label, x=x.end, y=y.start + 27, class_="end"))
    return element("g", *parts, class_="grid")


def _chance(values: Sequence[float], x: Scale, y: Scale) -> list[Html]:
    """Chance levels; their names are beside the plot."""
    places = y.place(np.array(values, dtype=float)).tolist()
    return [element("g", element("path", d=f"M{LEFT} {at:.1f}H{x.end:g}"), class_="chance") for at in places]


def _mark(mark: Mark, x: Scale, axis: Axis, run_names: Sequence[str]) -> Html:
    at = float(x.place(np.array([mark.update if axis == "updates" else mark.hours]))[0])
    bottom = HEIGHT - BOTTOM
    shape = f"M{at:.1f} {TOP}V{bottom}" if mark.went_back else f"M{at:.1f} {bottom - 9}l5 9h-10z"
    title = element("title", f"{run_names[mark.run]}, update {mark.update:,.0f}: {mark.text}")
    kind = "back" if mark.went_back else "warning"
    return element("g", element("path", title, d=shape, class_=kind), class_=style(mark.run))


def _line(line: Line, x: Scale, y: Scale, axis: Axis, run_names: Sequence[str]) -> Html:
    horizontal, vertical = x.place(_x(line, axis)), y.place(line.values)
    kept = thin(horizontal, vertical, COLUMNS)
    horizontal, vertical = horizontal[kept], vertical[kept]
    there = np.isfinite(vertical)
    name = line.title(run_names)
    classes = f"{line.split} curve-{min(line.number, 3)}"
    path = element("path", d=_path(horizontal, vertical), class_=classes, data_name=name)
    if line.split == "training":
        return element("g", path, class_=style(line.run))
    points = np.flatnonzero(there)
    points = points[:: -(-len(points) // MOST_MARKERS) or 1]
    shape = MARKERS[line.run % len(MARKERS)]
    outline = "".join(shape.format(x=horizontal[at], y=vertical[at]) for at in points)
    return element("g", path, element("path", d=outline, class_="marker"), class_=style(line.run))


def _path(horizontal: Floats, vertical: Floats) -> str:
    """A path through the points, interrupted where one is missing. A point between two gaps is a dot."""
    parts, down = [], False
    for at, height in zip(horizontal.tolist(), vertical.tolist(), strict=True):
        if np.isnan(height):
            down = False
            continue
        parts.append(f"{'L' if down else 'M'}{at:.1f} {height:.1f}")
        if not down:
            parts.append("h0")
        down = True
    return "".join(parts)


def _published(one: Published, values: dict[int, float], x: Scale, y: Scale) -> Html:
    at, heights = x.place(np.array([*values], dtype=float)), y.place(np.array([*values.values()]))
    path = element("path", d=_path(at, heights), class_="curve", data_name=one.name)
    shape = "".join(MARKERS[3].format(x=a, y=b) for a, b in zip(at, heights, strict=True))
    side = "end" if at[-1] > WIDTH / 2 else None
    text = element("text", one.name, x=round(float(at[-1]), 1), y=round(float(heights[-1]) + 16, 1), class_=side)
    return element("g", path, element("path", d=shape, class_="marker"), text, class_="published")


def _named(plot: Plot) -> list[Line]:
    """The lines whose names are beside their ends: parts of a metric, and further validation sets, if there are few."""
    found = [line for line in plot.lines if line.name and np.isfinite(line.values).any()]
    return [] if len(found) > MOST_NAMES or [line.split for line in found] == ["training"] else found


def _name(line: Line) -> str:
    return line.name if len(line.name) <= LONGEST_NAME else f"{line.name[: LONGEST_NAME - 1]}…"


def _names(lines: Sequence[Line], chance: Sequence[float], x: Scale, y: Scale) -> Html:
    """The names of lines and chance levels, to the right of the plot at their heights, moved apart."""
    found = [(at, "chance", "level") for at in _apart(y.place(np.array(chance, dtype=float)).tolist())]
    for line in lines:
        places = y.place(line.values)
        found.append((float(places[np.isfinite(places)][-1]), _name(line), style(line.run)))
    found.sort()
    spaced = spread([height + 4.0 for height, _, _ in found], LINE_HEIGHT, TOP + 4.0, HEIGHT - BOTTOM)
    texts = [
        element("g", element("text", name, x=x.end + 7, y=round(place, 1)), class_=classes)
        for place, (_, name, classes) in zip(spaced, found, strict=True)
    ]
    return element("g", *texts, class_="names") if texts else join([])


def _apart(places: Sequence[float]) -> list[float]:
    """Places without those that are close to the one before, which share its name."""
    found: list[float] = []
    for place in sorted(places):
        if not found or place - found[-1] > LINE_HEIGHT:
            found.append(place)
    return found


def _description(plot: Plot, run_names: Sequence[str], axis: Axis) -> str:
    """The plot in words: where each curve ends."""
    ends = []
    for line in plot.lines:
        if (there := np.flatnonzero(np.isfinite(line.values))).size:
            first, last = (tick(float(line.values[at]), percent=plot.percent) for at in (there[0], there[-1]))
            ends.append(f"{line.title(run_names)}: {first} to {last}")
    over = "updates" if axis == "updates" else "hours seen"
    return f"{plot.title} ({plot.label}) over {over}. {'; '.join(ends[:12])}"
