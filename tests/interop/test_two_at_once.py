"""Two processes that write to one folder: the second is refused. A process that was killed refuses nobody."""

from __future__ import annotations

import multiprocessing
import re
import time
from pathlib import Path

import pytest

from tests.helpers.conversions import CONVERSIONS, ignore
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lock import locked
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.interop.exporting import export_checkpoint

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config("base", SMALL)
    save_model(folder, config, random_model(config, seed=1).state_dict(), TrainState(update=3))
    export_checkpoint(folder, folder / "huggingface", form="huggingface")
    return folder


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["import huggingface", "average"])
def test_what_others_write_in_the_folder_stays(name: str, run: Path, tmp_path: Path) -> None:
    """Another conversion may be writing a folder in it, and not every file with the name lock is ours."""
    unfinished = tmp_path / ".export.partial" / "config.json"
    unfinished.parent.mkdir()
    unfinished.write_text("{}")
    (tmp_path / "lock").write_text("of another program")
    with pytest.raises(UserError, match=r"lock: not a file of w2vscale; choose another folder$"):
        CONVERSIONS[name](run, tmp_path, ignore)
    assert (tmp_path / "lock").read_text() == "of another program"
    (tmp_path / "lock").unlink()
    CONVERSIONS[name](run, tmp_path, ignore)
    assert unfinished.read_text() == "{}" and (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize("name", ["import huggingface", "export huggingface", "consolidate", "average"])
def test_the_second_is_refused_and_takes_over_when_the_first_is_killed(name: str, run: Path, tmp_path: Path) -> None:
    work, output, reading = CONVERSIONS[name], tmp_path / "a" / "b", FORK.Event()

    def stop(done: int, total: int) -> None:
        reading.set()
        time.sleep(60)

    first = FORK.Process(target=work, args=(run, output, stop))
    first.start()
    try:
        assert reading.wait(30)
        files = below(tmp_path)
        refusal = rf"^{re.escape(str(output))}: in use by process {first.pid} on .*; stop it first, or choose another"
        with pytest.raises(UserError, match=refusal):
            work(run, output, ignore)
        assert below(tmp_path) == files
    finally:
        first.kill()
        first.join()
    assert any(".partial" in path for path in files)
    work(run, output, ignore)
    assert not [path for path in below(tmp_path) if ".partial" in path or path.endswith("lock")]
    work(run, tmp_path / "other", ignore)
    assert below(output) == below(tmp_path / "other")


@pytest.mark.parametrize("name", ["import huggingface", "average"])
def test_the_folder_of_a_run_that_has_just_begun_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    def train() -> None:
        with locked(tmp_path / "exp", print):
            began.set()
            time.sleep(60)

    began = FORK.Event()
    process = FORK.Process(target=train)
    process.start()
    try:
        assert began.wait(30)
        with pytest.raises(UserError, match=f"exp: in use by process {process.pid}"):
            CONVERSIONS[name](run, tmp_path / "exp", ignore)
    finally:
        process.kill()
        process.join()
