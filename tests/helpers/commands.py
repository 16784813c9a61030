"""Commands: their errors, and the real program in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from w2vscale.cli.app import app
from w2vscale.errors import UserError


def error_of(*arguments: object) -> str:
    """The error of a command: one line, without a traceback or the text of another library."""
    with pytest.raises(UserError) as caught:
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
    message = str(caught.value)
    assert message and "\n" not in message
    assert "torchaudio" not in message
    return message


def command(*arguments: object, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, or a script."""
    given = ["-c", script] if script is not None else ["-m", "w2vscale"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *given, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )
