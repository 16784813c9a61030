"""The sweeps of docs/sweeps.md: what a shell and the agent of Weights & Biases start are runs with valid settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

from w2vscale.config import Config, load_config

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "sweeps.md").read_text()
RUNS = set(product((1e-4, 3e-4, 1e-3), (0, 1)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the file that all runs share, and a `w2vscale` that writes down its arguments."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "run.yaml").write_text(blocks("yaml")[0])
    program = tmp_path / "w2vscale"
    program.write_text('#!/bin/bash\nprintf "%q " "$@" >> started\necho >> started\n')
    program.chmod(0o755)
    return tmp_path


def started(folder: Path, *command: str, **environment: str) -> list[tuple[list[str], Config]]:
    """The arguments and settings of the runs that a command starts."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=folder, env=os.environ | environment | {"PATH": path}, check=True, timeout=60)
    found = []
    for line in (folder / "started").read_text().splitlines():
        name, source, *arguments = shlex.split(line)
        assert name == "train" and arguments[-2] == "--exp"
        ours = [each for each in arguments[:-2] if not each.startswith("logging.wandb=")]
        found.append((arguments, load_config(folder / source, ours)))
    return found


def test_a_shell_starts_every_combination(folder: Path) -> None:
    runs = started(folder, "bash", "-euc", blocks("bash")[0])
    assert {(config.optim.lr, config.trainer.seed) for _, config in runs} == RUNS
    assert len({arguments[-1] for arguments, _ in runs}) == len(runs) == len(RUNS)


def test_so_does_the_agent_of_weights_and_biases(folder: Path) -> None:
    """It replaces `${args_no_hyphens}` by KEY=VALUE (wandb/sdk/launch/sweeps/utils.py), and sets WANDB_RUN_ID."""
    sweep = yaml.safe_load(blocks("yaml")[1])
    draws = {key: rule.get("values", [rule.get("min"), rule.get("max")]) for key, rule in sweep["parameters"].items()}
    for number, values in enumerate(product(*draws.values())):
        arguments = [f"{key}={value}" for key, value in zip(draws, values, strict=True)]
        place = sweep["command"].index("${args_no_hyphens}")
        command = [*sweep["command"][:place], *arguments, *sweep["command"][place + 1 :]]
        runs = started(folder, *command, WANDB_RUN_ID=f"id{number}")
        assert runs[-1][0][-1] == f"exp/sweep/id{number}"
        assert (runs[-1][1].optim.lr, runs[-1][1].trainer.seed) == values
    assert len(runs) == 4


def test_the_script_for_hydra_gives_settings_without_the_plus() -> None:
    """What Hydra 1.3.8 calls the overrides of a job, for the command on the page."""
    (script,) = blocks("python")
    (rule,) = re.findall(r"settings = \[(.*) for override in sweep\.overrides\.task\]", script)
    overrides = [eval(rule, {"override": override}) for override in ("+optim.lr=0.0003", "+trainer.seed=1")]
    config = load_config("tiny", overrides)
    assert (config.optim.lr, config.trainer.seed) == (3e-4, 1)
