"""Puts the report together: one HTML file with its style, its script, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from w2vscale.analysis.report.curves import Mark, Plot, marks, plots
from w2vscale.analysis.report.error_rates import evaluations
from w2vscale.analysis.report.html import Html, element, join, section
from w2vscale.analysis.report.reading import Run, read_runs
from w2vscale.analysis.report.samples import samples
from w2vscale.analysis.report.svg import draw, sample, style
from w2vscale.analysis.report.tables import cards, data, health, latest_metrics, settings
from w2vscale.errors import UserError
from w2vscale.files import write_text
from w2vscale.objectives.base import Published
from w2vscale.version import __version__

FOLDER = Path(__file__).parent
MENU = {
    "metrics": "Metrics", "curves": "Curves", "health": "Health", "samples": "Samples", "errors": "Error rates",
    "evaluations": "Evaluations", "settings": "Settings", "data": "Data", "hardware": "Hardware",
}  # fmt: skip


def write_report(
    exps: Sequence[Path],
    output: Path,
    *,
    published: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Run]:
    """Write the report of one or several runs as one HTML file, and return the runs.

    `published`: draw published curves, too. `progress` is called with (steps done, steps in total).
    Raises UserError if a folder is not a run folder, a run has no metrics yet, nothing is published on any of the
    objectives, or the file cannot be written.
    """
    done, total = 0, len(exps) + 1

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    progress(0, total)
    runs = read_runs(exps, progress=step)
    if published and not any(panel.published for run in runs for panel in run.panels):
        objectives = ", ".join(dict.fromkeys(run.config.objective.name for run in runs))
        raise UserError(f"--reference published: nothing is published on objective.name={objectives}; leave it out")
    write_text(output, page(runs, published=published))
    step()
    return runs


def page(runs: Sequence[Run], *, published: bool) -> str:
    """The report as HTML."""
    names = ", ".join(run.name for run in runs)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, w2vscale {__version__}"
    sections = [
        latest_metrics(runs),
        _curves(runs, plots(runs, published=published), marks(runs)),
        health(runs),
        samples(runs),
        evaluations(runs),
        settings(runs),
        data(runs),
    ]
    content = join(sections)
    links = [element("a", title, href=f"#{name}") for name, title in MENU.items() if f'id="{name}"' in content]
    body = [
        element("header", element("h1", f"Report of {names}"), element("p", made, class_="note"), cards(runs)),
        element("nav", *links, aria_label="sections"),
        element("main", content),
    ]
    # The style hides what belongs to a run when its box in the legend is not ticked.
    hiding = "".join(
        f"body:has(#show-{one}:not(:checked)) .plots .run-{one}{{display:none}}" for one in range(len(runs))
    )
    css = (FOLDER / "style.css").read_text(encoding="utf-8") + hiding
    script = (FOLDER / "script.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{names}: report"),
        element("style", Html(css)),
    )
    whole = element("html", head, element("body", *body, element("script", Html(script))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _curves(runs: Sequence[Run], found: Sequence[Plot], marked: Sequence[Mark]) -> Html:
    names = [run.name for run in runs]
    axis = element(
        "fieldset",
        element("legend", "Horizontal axis"),
        element("label", element("input", type="radio", name="axis", id="by-updates", checked=True), " updates"),
        element("label", element("input", type="radio", name="axis", id="by-hours"), " hours seen"),
    )
    shown = element(
        "fieldset",
        element("legend", "Runs"),
        *(
            element(
                "label",
                element("input", type="checkbox", id=f"show-{number}", checked=True),
                element("span", sample(number), class_=style(number)),
                name,
            )
            for number, name in enumerate(names)
        ),
    )
    figures = [
        element(
            "figure",
            element("figcaption", element("h3", plot.title), element("p", plot.label), *_beyond(plot)),
            draw(plot, marked, names, "updates"),
            draw(plot, marked, names, "hours"),
        )
        for plot in found
    ]
    sources = {one.name: one for plot in found for one in plot.published}.values()
    references = [
        element(
            "p", element("b", f"{one.name}: "), f"{_values(one)}. {one.source}. {one.caveat}. ",
            element("a", one.url, href=one.url),
            class_="note",
        )
        for one in sources
    ]  # fmt: skip
    return section(
        "Curves",
        element("div", axis, shown, class_="controls"),
        element("p", *_key(found, marked), class_="note key"),
        element("div", *figures, class_="plots"),
        *references,
        name="curves",
    )


def _beyond(plot: Plot) -> list[Html]:
    """Published values that are too far ahead of the runs to be drawn."""
    return [
        element("p", f"{one.name} (beyond this axis): {_values(one, 2)}, …", class_="beyond")
        for one in plot.published
        if plot.beyond(one)
    ]


def _values(published: Published, count: int | None = None) -> str:
    first, *others = [f"{value:.3f} at {update:,}" for update, value in published.values.items()][:count]
    return ", ".join([f"{first} updates", *others])


def _key(found: Sequence[Plot], marked: Sequence[Mark]) -> list[str]:
    """What the lines and marks mean."""
    texts = ["Thin line: training. Thick line with markers: validation."]
    if any(plot.chance for plot in found):
        texts.append("Dotted: chance level.")
    if any(line.split == "further" for plot in found for line in plot.lines):
        texts.append("Thin line with markers and a name: a further validation set.")
    if any(line.number for plot in found for line in plot.lines):
        texts.append("Fainter: further curves of the same run.")
    if any(mark.went_back for mark in marked):
        texts.append("Vertical dashes: the run went back to this checkpoint.")
    if any(not mark.went_back for mark in marked):
        texts.append("▲: a warning (see Health).")
    return [" ".join(texts)]
