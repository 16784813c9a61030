"""What a run shows: golden transcripts of one run on terminals of several widths, without colour, and in a pipe."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import pyte
import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.spelled import SPELLING, some_texts, write_spelled
from tests.helpers.tasks import bad_windows
from w2vscale.config import load_config
from w2vscale.files import read_records
from w2vscale.objectives.base import Objective
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.objectives.ctc import Ctc
from w2vscale.runtime import StopRequest
from w2vscale.training import display, metrics, summary
from w2vscale.training.callbacks import Callbacks
from w2vscale.training.display import Verbosity, duration, wrapped
from w2vscale.training.train import train

GOLDEN = Path(__file__).with_name("transcripts.txt")
REWRITE = "REWRITE_TRANSCRIPTS"
"""Set this variable to rewrite the golden file; then read the difference."""

VARIANTS: dict[str, dict[str, Any]] = {
    "60 columns": {"columns": 60},
    "80 columns": {"columns": 80},
    "200 columns": {"columns": 200},
    "80 columns, NO_COLOR": {"columns": 80, "color": False},
    "80 columns, --quiet": {"columns": 80, "verbosity": "quiet"},
    "pipe": {"columns": None},
    "pipe, --verbose": {"columns": None, "verbosity": "verbose"},
    "60 columns, resumed with other settings, and stopped": {
        "columns": 60, "more": ["trainer.updates=20", "health.loss_ratio=1.1"], "after": "pipe", "stop_at": 9,
    },
    "80 columns, --quiet, in trouble, so that it goes back": {
        "columns": 80, "verbosity": "quiet", "bad": (8, 9),
        "more": ["trainer.updates=14", "checkpoint.every=4", "logging.every=1", "health.action=roll_back",
                 "health.patience=2"],
    },
    "80 columns, fine-tuning with CTC and a second validation set": {"columns": 80, "spelled": True},
}  # fmt: skip
METRICS = {  # of all objectives
    "loss": 4.3125,
    "blank_fraction": 0.25,
    "label_error_rate": 0.5,
    "wer": 0.75,
    "accuracy": 0.0703,
    "code_perplexity_0": 11.9,
    "code_perplexity_1": 8.1,
    "used_entries_0": 15,
    "used_entries_1": 14,
}
SPEEDS = {
    "grad_norm": 1.25,
    "audio_seconds_per_second": 812.4,
    "updates_per_second": 0.0125,
    "data_wait_fraction": 0.4,
    "peak_memory_gib": 1.5,
}


class FixedTime(datetime):
    """The time at which all runs are."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FixedTime:
        return cls(2026, 1, 2, 3, 4, tzinfo=UTC)

    def astimezone(self, tz: tzinfo | None = None) -> FixedTime:
        return self


class Terminal(io.StringIO):
    """Standard output on a terminal."""

    def isatty(self) -> bool:
        return True


def fix_what_varies(patch: pytest.MonkeyPatch) -> None:
    """Replace what depends on the machine, down to the last digits of a loss."""
    read = metrics.Meter.read

    def read_fixed(self: metrics.Meter, *arguments: Any) -> dict[str, float]:
        return read(self, *arguments) | SPEEDS

    def with_fixed_line(objective: type[Objective]) -> None:
        line = objective.line
        patch.setattr(
            objective, "line", lambda self, values: line(self, {key: METRICS.get(key, values[key]) for key in values})
        )

    ticks = iter(range(10**6))
    patch.setattr(metrics.Meter, "read", read_fixed)
    with_fixed_line(Contrastive)
    with_fixed_line(Ctc)
    patch.setattr(display, "monotonic", lambda: 60.0 * next(ticks))
    patch.setattr(display, "datetime", FixedTime)
    patch.setattr(summary, "device_name", lambda device: "Test Processor")
    patch.setattr(summary.torch, "get_num_threads", lambda: 2)
    patch.setattr(summary.socket, "gethostname", lambda: "node1")


def shown(
    corpus: SmallCorpus, exp: Path, patch: pytest.MonkeyPatch,
    *, columns: int | None, color: bool = True, verbosity: Verbosity = "normal", more: Sequence[str] = (),
    stop_at: int | None = None, bad: Sequence[int] = (), spelled: bool = False,
) -> tuple[str, bool]:  # fmt: skip
    """What a run of six updates, or with `more` settings, leaves on the screen, and whether something is in colour.

    After the line of update `stop_at` it receives SIGTERM. Windows `bad` give a high loss. `spelled`: it fine-tunes.
    """
    stream = io.StringIO() if columns is None else Terminal()
    patch.setattr("sys.stdout", stream)
    patch.setenv("TERM", "xterm-256color")
    patch.delenv("COLORTERM", raising=False)
    patch.setenv("COLUMNS", str(columns or 80))
    patch.setenv("NO_COLOR", "" if color else "1")
    settings: list[str] = [*MICRO_RUN, f"data.train={corpus.train}", f"data.validation={corpus.validation}"]
    if spelled:
        texts = write_spelled(exp.with_name("spelled"), some_texts(8))
        named = ("data.train", "data.validation", "data.validation_sets.other")
        settings = [*SPELLING, *(f"{name}={texts}" for name in named)]
    few = ("trainer.updates=6", "trainer.validate_every=6", "schedule.warmup_updates=2", "checkpoint.every=3",
           "logging.every=2", "checkpoint.asynchronous=false")  # fmt: skip
    config = load_config("base", [*settings, *few, *more])

    def stop_there(update: int, values: Mapping[str, float]) -> None:
        if update == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with StopRequest() as stop, bad_windows(bad, micro_batches=config.batch.micro_batches):
        code = train(config, exp, verbosity=verbosity, stop=stop, callbacks=Callbacks(on_update=stop_there))
    assert code == (0 if stop_at is None else 128 + signal.SIGTERM)
    written = stream.getvalue()
    if columns is None:
        assert "\x1b" not in written
        return without_times(written, exp), False
    screen = pyte.Screen(columns, 200)
    pyte.Stream(screen).feed(written.replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display]
    colored = any(cell.fg != "default" for row in screen.buffer.values() for cell in row.values())
    return without_times("\n".join(lines).rstrip() + "\n", exp), colored


def without_times(text: str, exp: Path) -> str:
    """Replace the name of the folder, durations, and losses that are not those of `METRICS`."""
    text = re.sub(r"\d+\.\d+ s(?=[,\n])", "0.00 s", text.replace(str(exp), "exp/run"))
    return re.sub(r"(is|median) \d+\.\d+", r"\1 4.312", text)


def test_transcripts(small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, colors = {}, {}
    monkeypatch.chdir(tmp_path)
    for number, (name, variant) in enumerate(VARIANTS.items()):
        with monkeypatch.context() as patch:
            fix_what_varies(patch)
            after = variant.get("after")
            exp = Path(f"exp/ru{list(VARIANTS).index(after) if after else number}")
            given = {key: value for key, value in variant.items() if key != "after"}
            found[name], colors[name] = shown(small_corpus, exp, patch, **given)
    text = "\n".join(f"=== {name} ===\n{transcript}" for name, transcript in found.items())
    if REWRITE in os.environ:
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert colors["80 columns"] and not colors["80 columns, NO_COLOR"]
    for name, variant in VARIANTS.items():
        if variant["columns"] is not None:
            assert max(map(len, found[name].splitlines())) <= variant["columns"]


def test_the_log_has_all_lines_with_times_whatever_is_shown(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = tmp_path / "exp"
    fix_what_varies(monkeypatch)
    text, _ = shown(small_corpus, exp, monkeypatch, columns=60, verbosity="quiet")
    lines = (exp / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    logged = [line.partition(" ")[2] for line in lines]
    assert "warning" in text and "loss" not in text
    wanted = GOLDEN.read_text(encoding="utf-8").partition("=== pipe, --verbose ===\n")[2].partition("\n=== ")[0]
    assert without_times("\n".join(logged) + "\n", exp) == wanted
    events = read_records(exp / "logs" / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "warning"]
    assert (
        events[0]["training"]["utterances"] == 24 and events[0]["devices"] == "1 × Test Processor (2 threads per rank)"
    )
    assert events[1]["update"] == 2 and "waiting for data" in events[1]["text"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3 * 3600 + 62, "3:01:02"), (90_061, "1 d 01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_break_between_fields_then_between_words_and_never_in_words() -> None:
    assert wrapped("update 1  loss 2.5 nats  left 1:00", 20) == "update 1\n  loss 2.5 nats\n  left 1:00"
    assert wrapped("one two three four", 9) == "one two\n  three\n  four"
    path = "/a/path/that/is/longer/than/a/line"
    assert wrapped(f"saved {path} now", 12) == f"saved\n  {path}\n  now"
    assert wrapped("the text after a prefix", 16, "name  ") == "name  the text\n      after a\n      prefix"
