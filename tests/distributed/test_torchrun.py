"""`python -m w2vscale.distributed.torchrun`: torchrun's agent in a real process, with shells in place of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.long]


def torchrun(script: str, folder: Path) -> subprocess.Popen[str]:
    """Two ranks that run a shell script, in which torchrun replaces $$ by $."""
    options = ("--standalone", "--nproc-per-node", "2", "--no-python")
    return subprocess.Popen(
        [sys.executable, "-m", "w2vscale.distributed.torchrun", *options, "sh", "-c", script],
        cwd=folder,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ
        | {
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1",  # as in recipes/utils/environment.sh
        },
    )


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("exit 0", 0, None),
        ("[ $RANK = 0 ] || exit 2; sleep 60", 2, None),  # the rank has printed its error
        ("[ $RANK = 0 ] || exit 75; sleep 60", 75, None),
        ("[ $RANK = 0 ] || exit 1; sleep 60", 1, "error: rank 1 failed (see above), exit code 1"),
        ("[ $RANK = 1 ] || kill -9 $$$$; sleep 60", 137, "error: rank 0 was killed by SIGKILL (out of memory?)"),
    ],
)
def test_the_code_is_that_of_the_first_rank_that_failed(
    script: str, code: int, line: str | None, tmp_path: Path
) -> None:
    process = torchrun(script, tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert [each for each in errors.splitlines() if each.startswith("error: ")] == ([line] if line else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_reaches_the_ranks_and_is_the_code(number: signal.Signals, tmp_path: Path) -> None:
    name = number.name.removeprefix("SIG")
    script = f'trap "touch saved-$RANK; exit 0" {name}; touch ready-$RANK; while :; do sleep 0.1; done'
    process = torchrun(script, tmp_path)
    deadline = time.monotonic() + 60.0
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))
