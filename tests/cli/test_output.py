"""Standard output that is closed, full, or whose reader has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.reader import open_checkpoint

COMMAND = (sys.executable, "-m", "w2vscale")


def test_a_run_goes_on_when_its_reader_has_ended(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    arguments = ("train", "base", *MICRO_RUN, f"data.train={small_corpus.train}", "--exp", str(exp))
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("run ")
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait(120) == 0
    log = (exp / "logs" / "train.log").read_text()
    assert "warning: standard output cannot be written (Broken pipe); training goes on" in log
    assert open_checkpoint(exp).state.update == 12 and "finished 12 updates" in log


@pytest.mark.parametrize("arguments", [("config", "keys"), ("--help",), ("config", "show", "tiny")])
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_a_command_needs_no_standard_output() -> None:
    command = f"{sys.executable} -m w2vscale config show tiny >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
