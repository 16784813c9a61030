"""The log of events is read whatever is in it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.run_folders import BACK, SPIKE, START
from w2vscale.analysis.events import Event, Events, Start, read_events

STOP = {"event": "stop", "time": "2026-11-29T22:00:00Z", "update": 60, "text": "stopped by SIGTERM"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


def write(exp: Path, *lines: str) -> Path:
    (exp / "logs").mkdir(exist_ok=True)
    (exp / "logs" / "events.jsonl").write_text("\n".join(lines))
    return exp


def test_every_event_is_read(tmp_path: Path) -> None:
    warning = {"event": "warning", "time": "2026-11-29T20:30:00Z", "update": 20, "text": "loading is slow"}
    found = read_events(write(tmp_path, *map(json.dumps, (START, warning, SPIKE, BACK, STOP))))
    start = found.starts[0]
    assert (start.host, start.hours, start.utterances, start.epochs, start.cuda) == (
        "node-17",
        960.9,
        281_241,
        2.5,
        "13.0",
    )
    assert [event.kind for event in found.happened] == ["warning", "health", "roll_back", "stop"]
    assert found.happened[1].finding == "spike" and found.happened[2].left_at == 50
    assert found.stopped == Event("stop", 60, "stopped by SIGTERM", "2026-11-29T22:00:00Z")


def test_a_run_that_continues_is_not_stopped(tmp_path: Path) -> None:
    found = read_events(write(tmp_path, *map(json.dumps, (START, STOP, START))))
    assert found.stopped is None and len(found.starts) == 2


def test_the_same_trouble_at_the_same_update_is_one_event(tmp_path: Path) -> None:
    other = SPIKE | {"kind": "norm"}
    later = SPIKE | {"update": 50}
    again = SPIKE | {"text": "after a resume"}
    found = read_events(write(tmp_path, *map(json.dumps, (SPIKE, other, later, again)))).distinct()
    assert [(one.finding, one.update, one.text) for one in found] == [
        ("spike", 40, "the loss spikes"), ("norm", 40, "the loss spikes"), ("spike", 50, "the loss spikes"),
    ]  # fmt: skip


def test_a_folder_without_a_log_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == Events()


def test_damaged_and_unknown_lines_are_passed_over(tmp_path: Path) -> None:
    damaged = ('{"event": "start"', "7", json.dumps({"event": "party", "update": 1}), json.dumps({"event": "stop"}))
    odd = {
        "event": "start",
        "update": 3,
        "host": 7,
        "processes": -1,
        "epochs": "many",
        "training": [],
        "torch": "2.13.0",
    }
    found = read_events(write(tmp_path, *damaged, json.dumps(odd)))
    assert found == Events(starts=(Start(3, torch="2.13.0"),))


RECORDS = st.dictionaries(st.sampled_from([*START, "text", "kind", "left_at"]), JSON, max_size=8)


@given(RECORDS, st.sampled_from(["start", "health", "stop"]))
def test_any_values_are_read_or_passed_over(record: dict[str, object], event: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = read_events(write(Path(folder), json.dumps(record | {"event": event, "update": 5})))
    assert len(found.starts) + len(found.happened) == 1
