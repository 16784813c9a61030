"""run.sh in the folder of a run: the command that was given, so that it continues with as many processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.training.folder import run_script

ROOT = Path(__file__).resolve().parents[2]
FIRST = "Repeats this run, or continues it from its newest checkpoint."
COMMAND = ["train", "base", "optim.lr=1e-3", "--exp", "exp/a b"]


def parts(script: str) -> tuple[list[str], list[str]]:
    """The comments of a script, without marks, and the arguments of `w2vscale` in it."""
    lines = script.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-3:-1] == ["set -euo pipefail", f"cd {shlex.quote(os.getcwd())}"]
    words = shlex.split(lines[-1])
    assert words[:3] == [sys.executable, "-m", "w2vscale"] and words[-1] == "$@"
    return [line.removeprefix("# ") for line in lines[1:-3]], words[3:-1]


def test_one_process_repeats_the_command() -> None:
    assert parts(run_script(COMMAND, 1, None)) == ([FIRST], COMMAND)


@pytest.mark.parametrize("resume", [["--resume", "exp/other"], ["--resume=never"], ["--resume", "auto"]])
def test_resume_is_left_out(resume: list[str]) -> None:
    assert parts(run_script([*COMMAND[:2], *resume, *COMMAND[2:]], 1, None)) == ([FIRST], COMMAND)


def test_processes_of_another_launcher_are_started_by_the_script() -> None:
    assert parts(run_script(COMMAND, 4, 4))[1] == [*COMMAND, "--nproc-per-node", "4"]


@pytest.mark.parametrize("given", [["--nproc-per-node", "4"], ["--nproc-per-node=4"]])
def test_a_command_that_starts_processes_is_repeated(given: list[str]) -> None:
    assert parts(run_script([*COMMAND, *given], 4, 4)) == ([FIRST], [*COMMAND, *given])


@pytest.mark.parametrize(("processes", "here"), [(16, 8), (2, None)])
def test_a_run_on_several_machines_needs_its_launcher(processes: int, here: int | None) -> None:
    comments, arguments = parts(run_script(COMMAND, processes, here))
    assert arguments == COMMAND
    assert comments[1].startswith(f"It has {processes} processes: start this script with their launcher")


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240, cwd=cwd, env=environment)


def started(small_corpus: SmallCorpus, folder: Path, *launcher: object, options: tuple[str, ...] = ()) -> Path:
    """Run a YAML file by a relative path, into the default run folder. Returns that folder."""
    (folder / "conf.yaml").write_text("preset: base\ntrainer: {updates: 2}\nschedule: {warmup_updates: 1}\n")
    settings = [text for text in MICRO_RUN if not text.startswith(("trainer.updates=", "schedule.warmup_updates="))]
    command = ["train", "conf.yaml", *settings, f"data.train={small_corpus.train}", *options]
    done = run(sys.executable, *launcher, "-m", "w2vscale", *command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "exp" / "conf"


@pytest.mark.long
def test_it_continues_from_any_folder(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    exp = started(small_corpus, tmp_path, options=("--resume", "never", "--debug"))
    again = run(exp / "run.sh", cwd=Path("/"))
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout + again.stderr
    more = run(exp / "run.sh", "trainer.updates=3", "--debug", cwd=Path("/"))
    assert more.returncode == 0 and "resumed from" in more.stdout, more.stdout + more.stderr


@pytest.mark.long
@pytest.mark.distributed
def test_it_starts_the_processes_that_torchrun_started(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    exp = started(small_corpus, tmp_path, *torchrun)
    assert parts_end(exp) == ["--nproc-per-node", "2"]
    again = run(exp / "run.sh", cwd=Path("/"))
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout + again.stderr
    assert parts_end(exp) == ["--nproc-per-node", "2"]


def parts_end(exp: Path) -> list[str]:
    return shlex.split((exp / "run.sh").read_text().splitlines()[-1])[-3:-1]
