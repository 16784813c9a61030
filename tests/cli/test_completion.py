"""Completion in the shell: by bash itself, with the script that the program prints; and what is found where."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from w2vscale.cli import completion
from w2vscale.config import ScheduleConfig, preset_names
from w2vscale.objectives import all_settings

HEAVY = ("torch", "lhotse", "numpy")
WATCH = f"""
import atexit, os, sys
def note():
    with open(os.environ["LOADED"], "w") as file:
        file.write(" ".join(name for name in {HEAVY} if name in sys.modules))
atexit.register(note)
"""
"""Writes which heavy packages a process has imported, as a `sitecustomize`."""

PRESS_TAB = """
cd {folder}
source completion.sh
COMP_WORDS=({words})
COMP_CWORD={place}
_w2vscale_completion w2vscale
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p w2vscale
"""
Tab = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    """What bash offers after the words of a line, the last of which is the one that Tab completes."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "bin" / "w2vscale"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m w2vscale "$@"\n')
    program.chmod(0o755)
    (folder / "sitecustomize.py").write_text(WATCH)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    loaded = folder / "loaded"
    environment = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PATH": path, "LOADED": str(loaded), "HOME": str(folder),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }  # fmt: skip

    def run(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 and not done.stderr, done
        return done.stdout

    (folder / "completion.sh").write_text(run("w2vscale", "--show-completion", "bash"))
    (folder / "exp" / "one").mkdir(parents=True)
    (folder / "exp" / "one" / "config.yaml").touch()
    (folder / "exp" / "other").mkdir()
    (folder / "tiny_run.yaml").touch()

    def offered(*words: str) -> list[str]:
        loaded.unlink(missing_ok=True)
        line = " ".join(map(shlex.quote, words))
        *found, rule = run(
            "bash", "--norc", "-c", PRESS_TAB.format(folder=folder, words=line, place=len(words) - 1)
        ).splitlines()
        assert rule == "complete -o default -F _w2vscale_completion w2vscale"  # files where nothing is offered
        assert loaded.read_text() == "", words
        return [each for each in found if each]

    return offered


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["w2vscale", "fine"], ["finetune"]),
        (["w2vscale", "train", "tin"], ["tiny", "tiny_run.yaml"]),
        (["w2vscale", "train", "exp/"], ["exp/one"]),
        (["w2vscale", "train", "tiny", "optim.l"], ["optim.lr=", "optim.lr=VALUE"]),
        (["w2vscale", "train", "tiny", "engine.name", "=", "d"], ["ddp", "deepspeed"]),
        (["w2vscale", "train", "tiny", "data.train", "=", ""], []),
    ],
    ids=" ".join,
)
def test_bash_offers(words: list[str], expected: list[str], tab: Tab) -> None:
    assert tab(*words) == expected


def test_install_completion_is_offered() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "w2vscale", "--help"], capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert "--install-completion" in help_text


def test_every_setting_is_known() -> None:
    """Those of objectives are read from the source of the classes."""
    assert set(completion.names()) == {row[0] for table in all_settings().values() for row in table}


class TestSettings:
    @pytest.fixture(autouse=True)
    def _not_bash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(completion.VARIABLE, "complete_zsh")

    @pytest.mark.parametrize(
        ("incomplete", "expected"),
        [
            ("sch", [f"schedule.{key}=" for key in ScheduleConfig.model_fields]),
            ("objective.neg", ["objective.negatives="]),
            ("objective.voc", ["objective.vocabulary="]),
            ("engine.name=f", ["engine.name=fsdp"]),
            ("engine.compile=", ["engine.compile=true", "engine.compile=false", "engine.compile=auto"]),
            ("data.train=", []),
            ("optim.lr=", []),
            ("nothing", []),
            ("nothing.at=", []),
        ],
    )
    def test_names_and_values(self, incomplete: str, expected: list[str]) -> None:
        assert completion.settings(None, incomplete) == expected  # type: ignore[arg-type]

    def test_all_sections_at_first(self) -> None:
        found = completion.settings(None, "")  # type: ignore[arg-type]
        assert {"model.", "trainer.", "objective."} <= set(found) and all(each.endswith(".") for each in found)


class TestPaths:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("exp/one/checkpoints/update_00000003", "exp/two", "mine/run", "conf", "empty"):
            Path(folder).mkdir(parents=True)
        for file in ("exp/one/config.yaml", "exp/one/checkpoints/update_00000003/config.yaml", "mine/run/config.yaml"):
            Path(file).touch()
        for file in ("conf/a.yaml", "conf/b.yml", "conf/readme.txt", "top.yaml"):
            Path(file).touch()

    def test_sources(self) -> None:
        assert completion.sources("") == [*preset_names(), "top.yaml", "exp/one"]
        assert completion.sources("conf/") == ["conf/a.yaml", "conf/b.yml"]
        assert completion.sources("mine/r") == ["mine/run"]
        assert completion.sources("nowhere/") == []

    def test_checkpoints(self) -> None:
        assert completion.checkpoints("exp/") == ["exp/one"]
        assert completion.checkpoints("exp/one/") == ["exp/one/checkpoints/"]
        assert completion.checkpoints("exp/one/checkpoints/") == ["exp/one/checkpoints/update_00000003"]
        assert completion.checkpoints(str(Path("mine").resolve()) + "/") == [str(Path("mine/run").resolve())]
