"""`trainer.profile`: the trace is that of the chosen updates, and the run is what it is without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.training.train import train

SETTINGS = (*MICRO_RUN, "model.layers=1", "batch.micro_batches=2", "trainer.updates=6", "checkpoint.every=2")


def run(corpus: SmallCorpus, exp: Path, *settings: str) -> list[tuple[float, float]]:
    """Train; loss and gradient norm of every update."""
    assert train(load_config("base", [*SETTINGS, f"data.train={corpus.train}", *settings]), exp) == 0
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(exp / "metrics.jsonl", "train")]


def traced(path: Path) -> tuple[list[str], set[str]]:
    """The updates in a trace, and the names of all events."""
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    names = [event["name"] for event in sorted(events, key=lambda event: event["ts"])]
    return list(dict.fromkeys(name for name in names if name.startswith("update "))), set(names)


def test_a_trace_has_the_chosen_updates_and_changes_nothing(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(small_corpus, tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    exp = tmp_path / "exp"
    capsys.readouterr()
    assert run(small_corpus, exp, "trainer.profile=3:5") == plain
    (trace,) = (exp / "profile").iterdir()
    assert trace.name == "updates_00000003_to_00000004.json.gz"
    updates, names = traced(trace)
    assert updates == ["update 3", "update 4"]
    assert {"aten::mm", "aten::convolution"} & names and any("Backward" in name for name in names)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"profile: {trace} is the trace of updates 3 to 4; open it at https://ui.perfetto.dev" in printed

    trace.unlink()
    run(small_corpus, exp, "trainer.profile=3:5", "trainer.updates=8")
    assert not [*(exp / "profile").iterdir()]
    printed = " ".join(capsys.readouterr().out.split())
    assert "trainer.profile=3:5: the run is past these updates; no trace is made" in printed


@pytest.mark.parametrize(("span", "name"), [("5:90", "5_to_00000006"), ("1:2", "1_to_00000001")])
def test_a_run_that_ends_before_writes_what_there_was(
    span: str, name: str, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    run(small_corpus, tmp_path / "exp", f"trainer.profile={span}")
    assert [path.name for path in (tmp_path / "exp" / "profile").iterdir()] == [f"updates_0000000{name}.json.gz"]


def test_a_trace_that_cannot_be_written_is_a_warning(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = tmp_path / "exp"
    exp.mkdir()
    (exp / "profile").write_text("not a folder")
    assert len(run(small_corpus, exp, "trainer.profile=2:3")) == 6
    assert "warning: " in capsys.readouterr().out


@pytest.mark.parametrize("span", ["100", "100:", ":3", "0:3", "5:5", "7:5", "a:b", "1:2:3", "-1:4", "true", "1:102"])
def test_other_spans_are_refused(span: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.profile: {span}: (expected FIRST:END|at most 100 updates)"):
        load_config("base", [f"trainer.profile={span}"])
