"""A progress bar and lines on one terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pyte

PROGRAM = """
from w2vscale.cli.progress import bytes_bar, console
import sys, time
with bytes_bar("exporting") as progress:
    for number in range(3):
        progress(number, 3)
        time.sleep(0.15)  # so that the bar is drawn
        console.print(f"line {number} {'word ' * 20}")
        print("error", number, file=sys.stderr)
"""


def test_lines_stand_above_the_bar() -> None:
    """Standard output and standard error are the same terminal, of 60 columns."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # how the end of a pseudo-terminal is reported
        os.close(ours)
    assert process.wait(60) == 0
    assert b"exporting" in written
    screen = pyte.Screen(60, 50)
    pyte.ByteStream(screen).feed(written)
    shown = "".join("".join(screen.display).split())
    assert shown == "".join(f"line{number}{'word' * 20}error{number}" for number in range(3))
