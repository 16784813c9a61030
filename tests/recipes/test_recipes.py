"""The recipes themselves: their options, their settings, and a short run of the demo and of mini LibriSpeech."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.micro import MICRO_MODEL
from w2vscale.config import load_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/run.sh"))
SHORT = (*MICRO_MODEL, "trainer.updates=3", "schedule.warmup_updates=1", "data.workers=0", "logging.tensorboard=false")


def run(recipe: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        ["bash", str(RECIPES / recipe / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        # path.sh sets up .venv/ of the checkout; here the tests' own environment stands in for it.
        env=os.environ | {"W2VSCALE_VENV": str(Path(sys.prefix))},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*/conf/*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_settings_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_wrong_option_fails_and_help_lists_the_right_ones(recipe: str) -> None:
    said = run(recipe, "--bogus", "1", code=2)
    assert "--bogus" in said
    shown = run(recipe, "--help")
    assert "--stop-stage" in shown
    assert "--nproc" in shown


@pytest.fixture
def own_environment() -> None:
    if not (Path(sys.prefix) / ".w2vscale-setup").is_file():
        pytest.skip("recipes run in the environment that tools/setup.sh makes, and this is another")


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
def test_the_demo_goes_through_all_stages_and_repeats_nothing(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="synthetic speech needs the extra w2vscale[synth]")
    options = ("--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"))
    small = ("--train-minutes", "0.6", "--validation-minutes", "0.4", "--speakers", "2", "--label-minutes", "0.2")
    said = run("demo", *options, *small, "--finetune-updates", "2", *SHORT)
    for number in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10):
        assert f"stage {number}: done in" in said
    page = (tmp_path / "exp_0.2min" / "RESULTS.md").read_text()
    assert "| exp | 3 |" in page and "`exp_0.2min` against `exp_0.2min_scratch`" in page
    assert (tmp_path / "exp_0.2min" / "huggingface" / "tokenizer_config.json").is_file()
    figures = json.loads((tmp_path / "exp" / "evaluation.json").read_text())
    assert figures["update"] == 3
    assert (tmp_path / "exp" / "curves.png").is_file()

    again = run("demo", *options, *small, *SHORT)
    assert again.count("done already") == 10
    assert "done in" not in again


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("recipe", ["mini_librispeech", "librispeech"])
def test_recipes_work_on_real_speech(shared_data: Path, recipe: str, tmp_path: Path) -> None:
    options = ("--corpus", os.path.relpath(shared_data / "LibriSpeech"), "--data", str(tmp_path / "data"))
    said = run(recipe, *options, "--stop-stage", "1")
    assert "stage 1: done in" in said
    assert "stage 2" not in said
    said = run(recipe, *options, "--stage", "2", "--stop-stage", "2")
    assert "stage 2: done in" in said
    assert "stage 1" not in said
    assert (tmp_path / "data" / "manifests" / "cuts_train-clean-5.jsonl.index.npy").is_file()
    if recipe == "librispeech":  # its other stages are mini LibriSpeech's
        return
    short = (*SHORT, "data.max_seconds=2.0", "batch.max_seconds=8.0", "batch.micro_batches=2", "precision.compute=fp32")
    said = run(recipe, *options, "--exp", str(tmp_path / "exp"), "--stage", "4", "--stop-stage", "5", *short)
    assert "stage 5: done in" in said
    assert json.loads((tmp_path / "exp" / "evaluation.json").read_text())["utterances"] == 58
