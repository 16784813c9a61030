"""The tables of a report: state, metrics, settings, data, hardware and events of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache

from w2vscale.analysis.events import Start
from w2vscale.analysis.report.html import Html, element, join, section, table
from w2vscale.analysis.report.reading import Run
from w2vscale.analysis.report.scales import MISSING, metric, short, significant
from w2vscale.analysis.report.svg import sample, style
from w2vscale.config import Config, preset_names
from w2vscale.objectives import Difference, differing, load
from w2vscale.objectives.base import Panel

KINDS = {"health": "health", "warning": "warning", "roll_back": "went back", "stop": "stopped"}


def cards(runs: Sequence[Run]) -> Html:
    """A card for each run: its state and what it is."""
    return element("ul", *(_card(number, run) for number, run in enumerate(runs)), class_="cards")


def _card(number: int, run: Run) -> Html:
    start = _last_start(run)
    total = run.config.trainer.updates
    state = "complete" if run.complete else "stopped" if run.events.stopped else "open"
    facts = [
        run.config.objective.name,
        f"{short(start.parameters)} parameters" if start.parameters else "",
        f"{significant(run.train[-1]['hours_seen'])} h seen",
    ]
    return element(
        "li",
        element("h2", sample(number), run.name, class_=style(number)),
        element("p", element("span", run.state, class_=f"state {state}"), class_="states"),
        element(
            "progress", f"{run.update / total:.0%}", value=min(run.update, total), max=total,
            aria_label=f"updates of {run.name}",
        ),
        element("p", f"{run.update:,} of {total:,} updates", class_="note"),
        element("p", " · ".join(filter(None, facts)), class_="note"),
        element("p", run.events.stopped.text) if run.events.stopped and run.update < total else "",
    )  # fmt: skip


def latest_metrics(runs: Sequence[Run]) -> Html:
    """The newest training and validation metrics of each run."""
    titles = list(dict.fromkeys(panel.title for run in runs for panel in run.panels))
    columns = []
    for run in runs:
        shown = {("update", ""): f"{run.update:,}", ("hours seen", ""): significant(run.train[-1]["hours_seen"])}
        for panel, *both in zip(run.panels, *run.latest(), strict=True):
            for split, values in zip(("training", "validation"), both, strict=True):
                shown[panel.title, split] = _numbers(values, panel)
        for name, values_of_panels in run.latest_further().items():
            for panel, values in zip(run.panels, values_of_panels, strict=True):
                shown[panel.title, f"validation {name}"] = _numbers(values, panel)
        columns.append(shown)
    names = [("update", ""), ("hours seen", "")]
    further = dict.fromkeys(f"validation {name}" for run in runs for name in run.further)
    names += [(title, split) for title in titles for split in ("training", "validation", *further)]
    rows = [(", ".join(filter(None, name)), *(column.get(name, MISSING) for column in columns)) for name in names]
    rows = [row for row in rows if set(row[1:]) != {MISSING}]
    metrics = table(["metric", *(run.name for run in runs)], rows, label="latest metrics", numbers=True)
    return section("Latest metrics", metrics, name="metrics")


def settings(runs: Sequence[Run]) -> Html:
    """The settings in which runs differ; of a single run, those that differ from the nearest preset."""
    if len(runs) > 1:
        rows = differing([run.config for run in runs])
        columns = [run.name for run in runs]
        note = "Settings in which the runs differ. Defaults count." if rows else "The runs have the same settings."
    else:
        preset, rows = nearest_preset(runs[0])
        columns = [runs[0].name, f"preset {preset}"]
        note = f"Settings that differ from the preset that is nearest to this run, {preset}."
        if not rows:
            note = f"The settings are those of the preset {preset}."
    body = [
        (element("code", row.key), *(element("code", one) for one in row.values), _long(row.description))
        for row in rows
    ]
    scripts = [
        element(
            "details",
            element("summary", f"run.sh of {run.name}" if len(runs) > 1 else "run.sh"),
            element("pre", run.script, tabindex="0", role="region", aria_label=f"run.sh of {run.name}"),
        )
        for run in runs
        if run.script
    ]
    shown = table(("setting", *columns, "meaning"), body, label="settings") if rows else ""
    return section("Settings", element("p", note), shown, *scripts, name="settings")


def nearest_preset(run: Run) -> tuple[str, list[Difference]]:
    """The preset for the objective of a run from which the fewest settings differ, and those settings.

    A run folder does not say which preset it was started from.
    """
    found = {}
    for name in preset_names():
        config = _preset(name)
        if config.objective.name == run.config.objective.name:
            found[name] = differing([run.config, config])
    if not found:
        return "base", differing([run.config, _preset("base")])
    name = min(found, key=lambda each: len(found[each]))
    return name, found[name]


@cache
def _preset(name: str) -> Config:
    return load(name, new=False)[0]


def data(runs: Sequence[Run]) -> Html:
    """Data and hardware of each run, as its log of events has them."""
    further = dict.fromkeys(name for run in runs for name in run.config.data.validation_sets)
    rows = [
        _row("training manifests", runs, lambda run, start: _places(run.config.data.train)),
        _row("training set", runs, lambda run, start: _amount(start)),
        _row("epochs", runs, lambda run, start: significant(start.epochs) if start.epochs is not None else None),
        _row("padding", runs, _padding),
        _row("validation manifests", runs, lambda run, start: _places(run.config.data.validation)),
        _row("validation set", runs, lambda run, start: start.validation),
        *(_row(f"validation set {name}", runs, _further(name)) for name in further),
    ]
    hardware = [
        _row("host", runs, lambda run, start: start.host),
        _row("devices", runs, lambda run, start: start.devices),
        _row("processes", runs, lambda run, start: _count(start.processes)),
        _row("engine", runs, lambda run, start: start.engine or run.config.engine.name),
        _row("parameters", runs, lambda run, start: _parameters(start)),
        _row("peak memory", runs, lambda run, start: _memory(run)),
        _row("software", runs, lambda run, start: _software(start)),
        _row("starts", runs, lambda run, start: _starts(run)),
    ]
    columns = [run.name for run in runs]
    return join(
        section(
            title,
            table([title.lower(), *columns], [row for row in rows if set(row[1:]) != {MISSING}], label=title),
            name=name,
        )
        for title, rows, name in (("Data", rows, "data"), ("Hardware", hardware, "hardware"))
    )


def health(runs: Sequence[Run]) -> Html:
    """What happened to the runs."""
    rows = []
    for run in runs:
        seen = {event.update for event in run.events.happened if event.kind == "roll_back"}
        for event in run.events.distinct():
            went = f"from update {event.left_at:,}. " if event.left_at is not None else ""
            kind = "stopped early" if event.early else KINDS[event.kind]
            what = kind + (f": {event.finding}" if event.finding else "")
            rows.append((run.name, event.update, what, went + event.text, _time(event.time)))
        # Runs without a log of events have these in their metrics.
        rows += [
            (run.name, update, KINDS["roll_back"], "to the checkpoint of this update", MISSING)
            for update in dict.fromkeys(run.roll_backs)
            if update not in seen
        ]
    if not rows:
        return section("Health", element("p", "No trouble is recorded."), name="health")
    body = [(name, f"{update:,}", what, _long(text), time) for name, update, what, text, time in rows]
    shown = {
        "▲ a warning or health event": any(what.startswith(("health", "warning")) for _, _, what, _, _ in rows),
        "a vertical dashed line the update to which a run went back": any(run.roll_backs for run in runs),
    }
    marked = " and ".join(text for text, found in shown.items() if found)
    note = element("p", f"In the curves, {marked.replace(' ', ' marks ', 1)}.") if marked else ""
    events = table(("run", "update", "event", "text", "time (UTC)"), body, label="health events")
    return section("Health", note, events, name="health")


def _long(text: str) -> Html:
    """A cell that stays wide enough for sentences."""
    return element("span", text, class_="long")


Cell = Callable[[Run, Start], str | None]


def _row(name: str, runs: Sequence[Run], cell: Cell) -> list[str]:
    return [name, *(cell(run, _last_start(run)) or MISSING for run in runs)]


def _last_start(run: Run) -> Start:
    """The newest start in the log of events; one without any facts if there is none."""
    return run.events.starts[-1] if run.events.starts else Start(0)


def _numbers(values: Sequence[float | None], panel: Panel) -> str:
    if all(value is None for value in values):
        return MISSING
    return " / ".join(metric(value, percent=panel.percent) for value in values)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _amount(start: Start) -> str:
    """As the log has the validation set: `961 h in 281,241 utterances`."""
    hours = f"{significant(start.hours)} h" if start.hours is not None else ""
    utterances = f"{start.utterances:,} utterances" if start.utterances is not None else ""
    return " in ".join(filter(None, (hours, utterances)))


def _further(name: str) -> Cell:
    """The manifests of a further validation set."""
    return lambda run, start: _places(sets[name]) if name in (sets := run.config.data.validation_sets) else None


def _places(manifests: Sequence[object]) -> str:
    return ", ".join(map(str, manifests)) or "none"


def _padding(run: Run, start: Start) -> str | None:
    if start.padding is not None:
        return f"{start.padding:.1%}"
    value = run.train[-1].get("padding")
    return f"{value:.1%} (latest log line)" if value is not None else None


def _parameters(start: Start) -> str:
    if start.parameters is None:
        return ""
    trained = start.trained_parameters
    return f"{start.parameters:,}" + ("" if trained in (None, start.parameters) else f", {trained:,} of them trained")


def _memory(run: Run) -> str | None:
    peaks = [record["peak_memory_gib"] for record in run.train if record.get("peak_memory_gib") is not None]
    return f"{max(peaks):.1f} GiB per rank" if peaks else None


def _software(start: Start) -> str:
    named = (("w2vscale", start.w2vscale), ("PyTorch", start.torch), ("CUDA", start.cuda))
    return ", ".join(f"{name} {version}" for name, version in named if version)


def _starts(run: Run) -> str | None:
    starts = run.events.starts
    if not starts:
        return None
    newest = f"at update {starts[-1].update:,}, {_time(starts[-1].time)} UTC"
    return newest if len(starts) == 1 else f"{len(starts):,}, the last {newest}"


def _time(text: str | None) -> str:
    """A time without fractions of seconds, as the log has it if it has another form."""
    try:
        return datetime.fromisoformat(text or "").strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return (text or MISSING)[:40]
