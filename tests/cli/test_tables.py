"""Tables on terminals of any width, in a pipe, and in a file."""

from __future__ import annotations

import pytest

from w2vscale.cli import progress
from w2vscale.terminal import VisibleConsole

COLUMNS = ("setting", "default", "meaning")
ROWS = [
    ("optim.lr", "0.0005", "peak learning rate"),
    ("batch.same_bucket", "8", "draw up to this many consecutive micro-batches from one duration bucket"),
    ("short.row",),
]


def printed(monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    console = VisibleConsole(width=width, soft_wrap=True, highlight=False, markup=False)
    monkeypatch.setattr(progress, "console", console)
    with console.capture() as text:
        progress.print_table(COLUMNS, ROWS, title="settings", right=False)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def test_a_wide_table_has_a_line_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 120).splitlines()
    assert len(lines) == 2 + len(ROWS) and "draw up to this many" in lines[3]


def test_the_last_column_wraps_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, 60)
    assert "draw up to this many" in text and "bucket" in text.splitlines()[-2]
    assert max(map(len, text.splitlines())) <= 60


def test_a_table_that_does_not_fit_is_printed_as_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, 40) == (
        "\nsettings\n"
        "optim.lr\n"
        "  default  0.0005\n"
        "  meaning  peak learning rate\n"
        "batch.same_bucket\n"
        "  default  8\n"
        "  meaning  draw up to this many\n"
        "           consecutive micro-batches\n"
        "           from one duration bucket\n"
        "short.row"
    )
