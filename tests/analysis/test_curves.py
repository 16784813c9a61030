"""Long curves are thinned without losing a spike; axes have round numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.pages import Page
from tests.helpers.run_folders import write_run
from w2vscale.analysis.report.curves import Line, marks, plots, thin
from w2vscale.analysis.report.page import write_report
from w2vscale.analysis.report.reading import read_run
from w2vscale.analysis.report.scales import Scale, scale_of, short, spread

FINITE = st.floats(-1e30, 1e30, allow_nan=False)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400), st.integers(1, 30))
def test_thinning_keeps_the_ends_and_the_extremes(values: list[float], columns: int) -> None:
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept = thin(x, y, columns)
    assert len(kept) <= 4 * columns and list(kept) == sorted(set(kept.tolist()))
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    if np.isfinite(y).any():
        assert (np.nanmin(y[kept]), np.nanmax(y[kept])) == (np.nanmin(y), np.nanmax(y))


def test_every_spike_of_a_long_run_is_drawn() -> None:
    x, y = np.arange(4000.0), np.zeros(4000)
    spikes = np.arange(50, 4000, 100)
    y[spikes] = spikes
    assert set(y[thin(x, y, 250)].tolist()) == {0.0, *spikes.tolist()}


def test_a_page_of_long_runs_is_small(tmp_path: Path) -> None:
    exps = [write_run(tmp_path / name, "base", updates=400_000, every=100) for name in ("a", "b", "c")]
    write_report(exps, tmp_path / "report.html")
    assert sum((exp / "metrics.jsonl").read_bytes().count(b"\n") for exp in exps) == 3 * 4800
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_what_was_not_measured_is_a_gap(tmp_path: Path) -> None:
    exp = write_run(tmp_path / "exp", updates=50)
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    records[2]["accuracy"] = None
    (exp / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report([exp], tmp_path / "report.html")
    accuracy = plots([read_run(exp)], published=False)[1].lines[0]
    assert np.flatnonzero(np.isnan(accuracy.values)).tolist() == [2]
    page = Page((tmp_path / "report.html").read_text())
    pieces = [(one.attributes["d"] or "").count("M") for one in page.all("path", class_="training")]
    assert pieces[:6] == [1, 1, 2, 2, 1, 1], "updates and hours of the loss, the accuracy and a codebook"


def test_marks_are_at_the_hours_of_their_update(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "exp", roll_backs=(30, 30, 45)))
    assert [(mark.update, pytest.approx(mark.hours)) for mark in marks([run])] == [(30, 30 / 90), (45, 45 / 90)]


@given(FINITE, FINITE, st.integers(2, 8))
def test_ticks_are_on_the_axis(one: float, other: float, count: int) -> None:
    scale = scale_of(np.array([one, other]), 200, 0)
    ticks = scale.ticks(count)
    room = 1e-6 * (scale.high - scale.low)
    assert 1 <= len(ticks) <= 2 * count + 1
    assert all(scale.low - room <= tick <= scale.high + room for tick in ticks)
    places = scale.place(np.array([one, other]))
    assert ((places >= -1e-6) & (places <= 200 + 1e-6)).all()


@given(st.floats(1e-25, 1e25), st.floats(1.0, 1e6))
@example(1 / 3, 1.0)  # 7 * 0.05 is above 0.35
def test_logarithmic_ticks_are_on_the_axis(low: float, ratio: float) -> None:
    scale = scale_of(np.array([low, low * ratio, 0.0, -1.0, np.nan]), 200, 0, logarithmic=True)
    ticks = scale.ticks(4)
    assert len(ticks) <= 12 and all(scale.low <= tick <= scale.high for tick in ticks)
    assert np.isnan(scale.place(np.array([0.0, -1.0]))).all()
    assert 0 < scale.place(np.array([low]))[0] <= 200


@given(st.lists(st.floats(0, 200), max_size=14))
def test_names_are_moved_apart_within_their_bounds(places: list[float]) -> None:
    found = spread(sorted(places), 12.0, 16.0, 198.0)
    assert all(other - one >= 12.0 - 1e-9 for one, other in itertools.pairwise(found))
    assert all(16.0 - 1e-9 <= place <= 198.0 + 1e-9 for place in found)
    if all(other - one >= 12.0 for one, other in itertools.pairwise([4.0, *sorted(places), 210.0])):
        assert found == sorted(places), "none has to be moved"


def test_places() -> None:
    assert Scale(0, 10, 100, 0).place(np.array([0, 5, 10])).tolist() == [100, 50, 0]
    assert Scale(1, 100, 0, 100, logarithmic=True).place(np.array([1, 10, 100])).tolist() == [0, 50, 100]
    assert scale_of(np.array([0.1, 0.9]), 0, 1).low == 0.0, "values near zero have an axis from zero"
    assert scale_of(np.array([5.0, 6.0]), 0, 1).low > 4.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (250, "250"), (1500, "1,500"), (400_000, "400k"), (1_250_000, "1.25M"),
     (5e-4, "0.0005"), (2e-5, "2e-5"), (-20_000, "-20k"), (1e13, "1e13"), (2.5e9, "2.5G")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_lines_are_sorted_by_update(tmp_path: Path) -> None:
    exp = write_run(tmp_path / "exp", updates=30)
    lines = (exp / "metrics.jsonl").read_text().splitlines(keepends=True)
    (exp / "metrics.jsonl").write_text("".join(reversed(lines)))
    line: Line = plots([read_run(exp)], published=False)[0].lines[0]
    assert line.updates.tolist() == [10, 20, 30]
