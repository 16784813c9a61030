"""What is printed cannot command a terminal."""

from __future__ import annotations

import io
import json
import signal

import pytest
from rich.progress import Progress

from w2vscale.runtime import StopRequest
from w2vscale.terminal import CONTROL, LastingOutput, VisibleConsole, visible
from w2vscale.training.display import Display, TimeLeft

TITLE = "\x1b]0;another title\x07"


def test_control_characters_are_written_out_and_nothing_else_is_changed() -> None:
    assert visible(f"{TITLE}\x9b1m\r") == r"\u001b]0;another title\u0007\u009b1m\u000d"
    plain = "a tab\tand a line\nzwei Töne 語 \u200d \U0001f600 [red]"
    assert visible(plain) == plain


def test_json_keeps_its_values() -> None:
    values = {"text": f"{TITLE} \x7f \x9b1m"}
    printed = visible(json.dumps(values, ensure_ascii=False))
    assert not CONTROL.search(printed)
    assert json.loads(printed) == values


def test_consoles_show_them() -> None:
    console = VisibleConsole(width=80)
    display = Display(total=1, enabled=True)
    with console.capture() as printed, display.console.capture() as messages:
        console.print(TITLE)
        display.message(TITLE, "yellow")
    assert printed.get() == messages.get() == r"\u001b]0;another title\u0007" + "\n"


def test_the_bar_of_a_run_says_at_once_that_it_is_stopping() -> None:
    """Also while the main thread computes an update, so another thread looks for signals."""
    progress = Progress()
    progress.add_task("", left="0:05:00 left")
    with StopRequest() as stop:
        column = TimeLeft(stop)
        assert column.render(progress.tasks[0]).plain == "0:05:00 left"
        signal.raise_signal(signal.SIGTERM)
        assert column.render(progress.tasks[0]).plain.startswith("stopping after this update")


def test_a_character_that_the_output_has_not_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is not given up for it."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    output = LastingOutput(pytest.fail)
    output.write("2 × GPU\n")
    output.write("more\n")
    output.flush()
    assert written.getvalue() == b"2 \\xd7 GPU\nmore\n"
