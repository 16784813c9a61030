"""A run that has nothing left to do: known from its folder alone, and left to the run where anything is unusual."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.commands import command
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.format import encode, read_document
from w2vscale.checkpoint.lock import locked
from w2vscale.objectives.settings import load_settings
from w2vscale.training.finished import finished_run
from w2vscale.training.train import train

STATE = "train_state.json"
WEIGHTS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def settings(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    copy = tmp_path_factory.mktemp("corpus")
    for path in (small_corpus.train, small_corpus.train.with_name(f"{small_corpus.train.name}.index.npy")):
        shutil.copy(path, copy)
    data = (f"data.train={copy / small_corpus.train.name}", f"data.validation={small_corpus.validation}")
    return [*MICRO_RUN, *data, "trainer.updates=4", "schedule.warmup_updates=1", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def exp(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "exp"
    assert train(load_settings("base", settings), folder, command=["train", "base", *settings]) == 0
    return folder


@pytest.fixture
def copy(exp: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exp, tmp_path / "exp", symlinks=True)


def finished(folder: Path, settings: list[str], *others: str) -> str | None:
    return finished_run(load_settings("base", [*settings, *others]), folder, print)


def test_it_says_how_far_the_run_is_and_what_was_compared(exp: Path, settings: list[str]) -> None:
    newest = exp / "checkpoints" / "update_00000004"
    assert finished(exp, settings) == (
        f"nothing to do: the run has reached trainer.updates=4; all files of {newest} are there and have the right "
        f"sizes (to compare checksums: w2vscale checkpoint verify {exp})"
    )


@pytest.mark.parametrize("launcher", [[], ["--nproc-per-node", "2"]])
def test_the_command_imports_no_library_and_starts_no_process(
    exp: Path, settings: list[str], launcher: list[str]
) -> None:
    script = (
        "import sys\nfrom subprocess import Popen\nfrom w2vscale.__main__ import main\n"
        "Popen.__init__ = None\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'lhotse', 'tensorboard', 'matplotlib', 'transformers'} & sys.modules.keys()))"
    )
    log = exp / "logs" / "train.log"
    files = {file: file.read_bytes() for file in exp.rglob("*") if file.is_file() and file != log}
    done = command("train", "base", *settings, "--exp", exp, *launcher, script=script)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("nothing to do: the run has reached trainer.updates=4;") and last == "[]"
    assert files == {file: file.read_bytes() for file in exp.rglob("*") if file.is_file() and file != log}
    assert log.read_text().endswith(f"{first}\n")


def test_a_quiet_command_prints_nothing(exp: Path, settings: list[str]) -> None:
    done = command("train", "base", *settings, "--exp", exp, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "override",
    ["trainer.updates=5", "optim.lr=2e-3", "trainer.seed=7", "objective.negatives=21", "model.layers=4",
     "precision.compute=bf16", "checkpoint.keep_last=3", "checkpoint.store=s3://bucket/run"],
)  # fmt: skip
def test_other_settings_are_left_to_the_run(exp: Path, settings: list[str], override: str) -> None:
    assert finished(exp, settings, override) is None


def test_settings_that_change_no_update_are_ignored(exp: Path, settings: list[str]) -> None:
    ignored = ("logging.every=3", "logging.wandb=project", "health.patience=7", "watchdog.seconds=99", "data.workers=1")
    assert finished(exp, settings, *ignored) is not None


def cut_short(newest: Path) -> None:
    with (newest / WEIGHTS).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def without_validation(newest: Path) -> None:
    document = read_document(newest)
    (newest / STATE).write_text(encode(document).replace('"validation"', '"other"'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file is missing": lambda newest: (newest / WEIGHTS).unlink(),
    "a file is too short": cut_short,
    "a file does not belong to it": lambda newest: (newest / "more.safetensors").touch(),
    "its settings are damaged": lambda newest: (newest / "config.yaml").write_text("model: {}\n"),
    "its state is damaged": lambda newest: (newest / STATE).write_text("{}"),
    "its state has another checksum": without_validation,
    "its name is that of another update": lambda newest: newest.rename(newest.with_name("update_00000005")),
    "the run has no run.sh": lambda newest: (newest.parents[1] / "run.sh").unlink(),
    "the run has no config.yaml": lambda newest: (newest.parents[1] / "config.yaml").unlink(),
    "a save was interrupted": lambda newest: (newest.parent / "replaced_update_00000002").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_left_to_the_run(copy: Path, settings: list[str], damage: str) -> None:
    assert finished(copy, settings) is not None
    DAMAGES[damage](copy / "checkpoints" / "update_00000004")
    assert finished(copy, settings) is None


def test_a_checkpoint_without_validation_is_left_to_the_run(copy: Path, settings: list[str]) -> None:
    newest = copy / "checkpoints" / "update_00000004"
    document = json.loads((newest / STATE).read_text())
    assert document["validation"] != {}
    # As the format before, which had no checksum of train_state.json.
    (newest / STATE).write_text(json.dumps({**document, "format": 2, "sha256": None}).replace(', "sha256": null', ""))
    assert finished(copy, settings) is not None
    (newest / STATE).write_text(
        json.dumps({**document, "format": 2, "validation": {}, "sha256": None}).replace(', "sha256": null', "")
    )
    assert finished(copy, settings) is None


def test_weights_without_optimizer_state_are_left_to_the_run(exp: Path, copy: Path, settings: list[str]) -> None:
    shutil.rmtree(copy / "checkpoints")
    average(exp, copy, last=1)
    assert finished(copy, settings) is None


def test_other_data_is_left_to_the_run(exp: Path, settings: list[str], small_corpus: SmallCorpus) -> None:
    assert finished(exp, settings, f"data.train={small_corpus.validation}") is None
    manifest = Path(next(text for text in settings if text.startswith("data.train=")).partition("=")[2])
    content = manifest.read_bytes()
    manifest.write_bytes(content + content.splitlines(keepends=True)[0])
    try:
        assert finished(exp, settings) is None
    finally:
        manifest.write_bytes(content)
    assert finished(exp, settings) is not None


def test_another_process_that_uses_the_folder_is_named(copy: Path, settings: list[str]) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom w2vscale.checkpoint.lock import locked\n"
        "from w2vscale.training.finished import finished_run\n"
        "from w2vscale.objectives.settings import load_settings\n"
        "finished_run(load_settings('base', sys.argv[2:]), Path(sys.argv[1]), print)\n"
    )
    with locked(copy, print):
        done = command(copy, *settings, script=script)
    assert "UserError" in done.stderr and str(copy) in done.stderr.splitlines()[-1]


def test_a_new_run_has_something_to_do_and_no_folder_is_made(settings: list[str], tmp_path: Path) -> None:
    assert finished(tmp_path / "new", settings) is None
    assert not (tmp_path / "new").exists()
