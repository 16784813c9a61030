"""--print-command: what each recipe would run. tests/recipes/test_launchers.py has the launchers."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.recipes.test_launchers import RECIPES, clean

NAMES = sorted(path.parent.name for path in RECIPES.glob("*/run.sh"))


def printed_by(recipe: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What a recipe prints with --print-command, and nothing may be made."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        ["bash", str(RECIPES / recipe / "run.sh"), "--print-command", *options],
        capture_output=True,
        text=True,
        timeout=60,
        # Without an environment, which path.sh would set up.
        env=clean(folder, W2VSCALE_VENV=str(folder / "none")) | {"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path for path in sorted(folder.rglob("*")) if "bin" not in path.parts] == before
    return done


@pytest.mark.parametrize("recipe", [name for name in NAMES if name not in ("evidence", "librispeech", "xlsr")])
def test_all_commands_are_printed_and_none_runs(recipe: str, tmp_path: Path) -> None:
    there = tmp_path / "audio"
    there.mkdir()
    given = ("--audio", str(there), "--transcribed", str(there)) if recipe == "folder" else ()
    options = (*given, "--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"), "--nproc", "3")
    done = printed_by(recipe, tmp_path, *options, "--finetune-settings", "optim.lr=1e-4", "optim.lr=2e-4")
    found = [shlex.split(line) for line in done.stdout.splitlines()]
    commands = [line[next(n for n, word in enumerate(line) if word.endswith("w2vscale")) + 1 :] for line in found]
    assert [command[0] for command in commands] == ["train", "finetune", "finetune", "evaluate", "evaluate"]
    assert all(command[1:3] == ["--nproc-per-node", "3"] for command in commands)
    assert commands[0][-1] == "optim.lr=2e-4" and "optim.lr=1e-4" in commands[1]
    for number in (4, 7, 8):
        assert f"stage {number}: " in done.stderr
    assert done.stderr.count(": these commands would run\n") == 3
    assert done.stderr.count(": not run, because of --print-command\n") >= 5


def test_librispeech_needs_what_its_commands_depend_on(tmp_path: Path) -> None:
    manifests = tmp_path / "data" / "manifests"
    manifests.mkdir(parents=True)
    for part in ("train-clean-100", "dev-clean"):
        (manifests / f"cuts_{part}.jsonl").write_text("{}\n")
    options = ("--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"), "--launcher", "torchrun")
    done = printed_by("librispeech", tmp_path, *options)
    (line,) = done.stdout.splitlines()
    assert f"-m w2vscale train {RECIPES}/librispeech/conf/base.yaml" in line
    assert "the preset for fine-tuning depends on the size of the model" in done.stderr
    assert "which checkpoint of" in done.stderr
