"""Ctrl-C at any moment of any command: one line at most, exit code 130, no traceback, and no process is left."""

from __future__ import annotations

import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import ROOT, running
from tests.helpers.trained import trains

HIDE_CURSOR = b"\x1b[?25l"
SECONDS = 120.0
"""Within which everything has to have ended, also on a busy machine."""

PRESS = """
import os
import signal
import threading
import time

times = [float(each) for each in os.environ.pop("CTRL_C", "").split()]

def press():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.001)
    for each in times:
        time.sleep(each)
        os.killpg(0, 2)

if times:
    threading.Thread(target=press, daemon=True).start()
"""
"""Presses Ctrl-C as a terminal does, for all processes of the command. The seconds in $CTRL_C count from the moment at
which the program has begun, or from the one before. A `sitecustomize`: a module that Python runs before the program."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    what: str
    code: int
    printed: str
    errors: str
    left: list[int]  # process ids

    def check(self) -> bool:
        """Assert that it ended as it has to. Returns whether Ctrl-C ended it; it may have been faster."""
        assert "Traceback" not in self.printed + self.errors, self
        assert not self.left, self
        assert self.errors.count("\n") <= 1, self
        assert self.code in (0, 128 + signal.SIGINT, -signal.SIGINT), self
        assert self.code == 0 or self.errors in ("", "interrupted\n"), self
        return self.code != 0


class Command:
    """`w2vscale ARGUMENTS` as the leader of a session, with Ctrl-C after some seconds."""

    def __init__(self, folder: Path, arguments: Sequence[str], *times: float, module: str = "w2vscale") -> None:
        (folder / "sitecustomize.py").write_text(PRESS)
        self.what = f"{' '.join(arguments)[:60]} after {times}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ
            | {
                "CTRL_C": " ".join(map(str, times)),
                "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
            },
        )

    def end(self) -> Ended:
        try:
            printed, errors = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            printed, errors = self.process.communicate()
            raise AssertionError(f"{self.what}: did not end\n{printed}\n{errors}") from None
        deadline = time.monotonic() + 10
        while (left := of_session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return Ended(self.what, self.process.returncode, printed, errors, left)


def of_session(leader: int) -> list[int]:
    """The running processes of a session, or of sessions that its processes have made."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and running(int(path.name)):
                found.append(int(path.name))
    return found


@pytest.fixture(scope="module")
def folder(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and the folder in which commands run."""
    folder = tmp_path_factory.mktemp("pressed")
    trains(small_corpus.train, folder / "trained")
    return folder


def commands(corpus: SmallCorpus, number: int = 0) -> dict[str, list[str]]:
    """Commands that take seconds, by name. `number` is part of the names of what they write."""
    train = ["train", "base", *MICRO_RUN, f"data.train={corpus.train}", "trainer.updates=100000", "data.workers=2"]
    return {
        "help": ["--help"],
        "show": ["config", "show", "base"],
        "validate": ["data", "validate", str(corpus.train), "--audio", "--jobs", "2"],
        "index": ["data", "prepare", "folder", str(corpus.train.parent), f"prepared{number}", "--jobs", "2"],
        "features": ["features", "trained", str(corpus.train.parent / "train"), "--output", f"features{number}"],
        "evaluate": ["evaluate", "trained", "--cuts", str(corpus.validation)],
        "export": ["export", "trained", f"exported{number}", "--format", "huggingface"],
        "train": [*train, "--exp", "exp"],
        "launch": [*train, "--exp", "exp2", "--nproc-per-node", "2"],
    }


def test_ctrl_c_during_imports_arguments_and_work(folder: Path, small_corpus: SmallCorpus) -> None:
    """Several at once: most of their time is that of imports."""
    given = commands(small_corpus)
    pressed = [("help", 0.02), ("show", 0.1), ("validate", 0.6), ("evaluate", 1.0), ("train", 0.5)]
    started = [Command(folder, given[name], seconds) for name, seconds in pressed]
    launcher = ["--nproc-per-node", "1", "--no-python", "sleep", "60"]
    started.append(Command(folder, launcher, 0.3, module="w2vscale.distributed.torchrun"))
    assert sum([command.end().check() for command in started]) >= 1  # the others were faster than the signal


def test_the_second_one_ends_it_at_once(folder: Path, small_corpus: SmallCorpus) -> None:
    """While the first one waits for the end of a training step, or of what a worker does."""
    given = commands(small_corpus)
    started = [Command(folder, given[name], 0.8, 0.01, 0.3, 2.5) for name in ("validate", "features")]
    for command in started:
        command.end().check()


@pytest.mark.long
@pytest.mark.parametrize("name", ["train", "validate"])
def test_a_terminal_is_as_before(name: str, folder: Path, small_corpus: SmallCorpus) -> None:
    """Ctrl-C once the progress bar, which hides the cursor, is there; a second one 3 seconds later if it is needed."""
    shown, deadline, pressed = b"", time.monotonic() + SECONDS, 0.0
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(ROOT)
        arguments = commands(small_corpus, 99)[name]
        os.execv(sys.executable, [sys.executable, "-m", "w2vscale", *arguments])
    with suppress(OSError):  # EIO: the terminal is closed at the other end
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.05)[0]:
                shown += os.read(terminal, 65536)
            if HIDE_CURSOR in shown and time.monotonic() - pressed > 3.0:
                os.write(terminal, b"\x03")
                pressed = time.monotonic()
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 130, -signal.SIGINT) and b"Traceback" not in shown, shown[-2000:]
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(HIDE_CURSOR), shown[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("name", ["show", "validate", "index", "features", "evaluate", "export", "train", "launch"])
def test_ctrl_c_at_random_moments(name: str, folder: Path, small_corpus: SmallCorpus) -> None:
    draw = random.Random(name)
    ended = 0
    for number in range(6):
        times = [draw.uniform(0.0, 0.6 if name == "show" or not number else 9.0)]
        times += [draw.uniform(0.0, 4.0) for _ in range(draw.randrange(3))]
        ended += Command(folder, commands(small_corpus, number)[name], *times).end().check()
    assert ended >= 1
