"""The recipes themselves: options, settings, a short run of the demo, and what is particular to the others."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.audio import noise, write_audio
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


@pytest.mark.parametrize(
    ("recipe", "option"),
    [(recipe, "lm") for recipe in NAMES]
    + [("librispeech", "corpus"), ("librispeech", "librilight"), ("folder", "audio"), ("folder", "transcribed")],
)
def test_a_path_where_nothing_is_ends_a_recipe(recipe: str, option: str, tmp_path: Path) -> None:
    there = ("--audio", str(tmp_path)) if recipe == "folder" and option != "audio" else ()
    assert f"run.sh: --{option} nowhere: no such file or folder" in run(
        recipe, *there, f"--{option}", "nowhere", "--stop-stage", "-1", code=2
    )


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
    said = run("demo", *options, *small, "--finetune-settings", "trainer.updates=2 data.workers=0", *SHORT)
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


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
def test_a_folder_of_any_audio(tmp_path: Path) -> None:
    for number in range(6):
        write_audio(tmp_path / "audio" / f"{number}.wav", noise(2.0, seed=number))
    options = ("--audio", str(tmp_path / "audio"), "--data", str(tmp_path / "data"), "--validation-share", "0.3")
    said = run("folder", *options, "--conf", "tiny", "--stop-stage", "2")
    assert "stage 2: done in" in said and "an epoch" in said
    assert (tmp_path / "data" / "manifests" / "cuts_validation.jsonl.index.npy").is_file()


def local(script: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", str(RECIPES / "librispeech" / "local" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stderr
    return done


def test_libri_lights_lists_are_read_from_its_folders(tmp_path: Path) -> None:
    for part, name in (("1h/0/clean", "3-3-0001"), ("1h/5/other", "1-1-0000"), ("9h/clean", "2-2-0002")):
        folder = tmp_path / part / name.split("-")[0] / name.split("-")[1]
        folder.mkdir(parents=True)
        (folder / f"{name}.flac").touch()
        (folder / f"{name.rpartition('-')[0]}.trans.txt").touch()
    for amount, names in (
        ("10min", ["3-3-0001"]),
        ("1h", ["1-1-0000", "3-3-0001"]),
        ("10h", ["1-1-0000", "2-2-0002", "3-3-0001"]),
    ):
        assert local("librilight_ids.sh", str(tmp_path), amount).stdout.split() == names
    assert "no folder" in local("librilight_ids.sh", str(tmp_path / "none"), "1h", code=2).stderr
    assert "choose 10min, 1h or 10h" in local("librilight_ids.sh", str(tmp_path), "100h", code=2).stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_language_model_is_fetched_whole_and_once(tmp_path: Path) -> None:
    (tmp_path / "4-gram.arpa.gz").write_bytes(gzip.compress(b"\\data\\\n"))
    there = tmp_path.as_uri()
    local("fetch_lm.sh", str(tmp_path / "lm"), OPENSLR=there)
    assert gzip.decompress((tmp_path / "lm" / "4-gram.arpa.gz").read_bytes()) == b"\\data\\\n"
    local("fetch_lm.sh", str(tmp_path / "lm"), OPENSLR="file:///nowhere")
    (tmp_path / "4-gram.arpa.gz").write_bytes(b"<html>not found</html>")
    assert local("fetch_lm.sh", str(tmp_path / "other"), OPENSLR=there, code=1)
    assert not (tmp_path / "other" / "4-gram.arpa.gz").exists()
