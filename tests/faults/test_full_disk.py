"""A disk that fills up: one clear line, no checkpoint is lost, and the run continues once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import save, store, tensors
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import ROOT, Command
from w2vscale.checkpoint.format import TrainState, committed, update_of
from w2vscale.checkpoint.lock import locked
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.checkpoint.verification import verify
from w2vscale.errors import UserError
from w2vscale.files import read_records

PAGE = 4096

FILLED_BY_TENSORBOARD = """
import sys
from threading import Thread
from w2vscale import runtime
runtime.enter()
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter("tb")
try:
    for _ in range(10):
        writer.add_text("long", "x" * 10**6, 1)
        writer.flush()
except OSError as error:
    print("caught:", error, file=sys.stderr)
Thread(target=lambda: 1 / 0).start()
"""


class Disk:
    """A small file system of its own, of which all but `room` bytes can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, room: int) -> None:
        """Fill the disk but for `room` bytes."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path).free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free - room, 1))

    def empty(self) -> None:
        """Give back the room."""
        (self.path / "filler").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Needs the right to mount."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_at_every_write_of_a_save(disk: Disk, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """The room grows page by page until the save succeeds. Without the check before it, the writes themselves fail."""
    monkeypatch.setattr(CheckpointStore, "_require_space", lambda self: None)
    folder = disk.path / "checkpoints"
    save(folder, 1)
    errors: list[str] = []
    for pages in range(40):
        disk.leave(pages * PAGE)
        writer = store(folder, asynchronous=asynchronous)
        try:
            writer.save(tensors(2.0), TrainState(update=2), "model: {}\n")
            writer.wait()
            break
        except UserError as error:
            errors.append(str(error))
        assert [update_of(path) for path in committed(folder)] == [1]
        assert not [*folder.glob(".*.partial")]
        assert open_checkpoint(folder).state.update == 1
    assert len(errors) >= 3  # the tensors, config.yaml, train_state.json
    assert all("cannot be written: " in error and "No space left on device" in error for error in errors)
    assert not any("\n" in error for error in errors)
    disk.empty()
    assert open_checkpoint(folder).state.update == 2
    save(folder, 3)
    assert [update_of(path) for path in committed(folder)] == [3]


def test_it_says_how_much_is_needed_and_free(disk: Disk) -> None:
    save(disk.path / "checkpoints", 1)
    disk.leave(0)
    with pytest.raises(UserError, match=r"cannot be written: it needs \d+ bytes, and the disk has 0 bytes free"):
        save(disk.path / "checkpoints", 2)


def test_an_error_of_tensorboards_thread_is_shown_once(disk: Disk) -> None:
    """By the command, for which the thread keeps it. Errors of other threads are shown as ever."""
    done = subprocess.run(
        [sys.executable, "-c", FILLED_BY_TENSORBOARD],
        cwd=disk.path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.startswith("caught: [Errno 28] No space left on device\nException in thread ")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.slow
def test_unfinished_files_that_fill_the_disk_are_deleted(disk: Disk) -> None:
    """What a process leaves that was killed while it wrote a checkpoint."""
    exp = disk.path / "exp"
    partial = exp / "checkpoints" / ".update_00000004.partial"
    partial.mkdir(parents=True)
    (exp / "lock").write_text("")
    with (partial / "shard").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk.path).free)
    assert shutil.disk_usage(disk.path).free == 0
    with locked(exp, print):
        assert not partial.exists()


@pytest.mark.long
def test_a_run_on_a_full_disk(disk: Disk, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """It is repeated on the full disk, with a little room, and with enough."""
    exp = disk.path / "exp"
    settings = (
        "trainer.updates=6", "checkpoint.every=2", "checkpoint.keep_last=1", "logging.tensorboard=true",
        f"data.train={small_corpus.train}",
    )  # fmt: skip

    def run(code: int) -> str:
        command = Command(tmp_path / "out.txt", "train", "base", *MICRO_RUN, *settings, "--exp", str(exp))
        return command.finish(code=code, timeout=120.0)

    def failed(printed: str) -> None:
        assert "Traceback" not in printed and "Error" not in printed.replace("UserError", "")
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "cannot be written: " in errors[0]
        assert not [*exp.rglob(".*.partial")]

    filler = disk.path / "late"
    (tmp_path / "early").mkdir()
    # The first checkpoint fits, the next does not.
    size = 3 * 2**20
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    failed(run(code=2))
    assert [update_of(path) for path in committed(exp / "checkpoints")] == [2]
    assert verify(exp).problems == []
    for room in (0, PAGE, 4 * PAGE, 16 * PAGE, 64 * PAGE):
        disk.leave(room)
        failed(run(code=2))
        assert verify(exp).problems == []
        assert open_checkpoint(exp).state.update == 2
    disk.empty()
    filler.unlink()
    assert "at update 2\n" in run(code=0)
    assert open_checkpoint(exp).state.update == 6
    assert [record["update"] for record in read_records(exp / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
