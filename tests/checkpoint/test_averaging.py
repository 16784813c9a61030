"""`w2vscale checkpoint average`: which checkpoints it takes, their mean, and what it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.checkpoints import change_committed, seal
from tests.helpers.micro import MICRO_MODEL
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.checkpoint.verification import verify
from w2vscale.cli.app import app
from w2vscale.config import Config, dump_config, load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.optim.canonical import specs_of

MODEL = (*MICRO_MODEL, "model.layers=1")
CONFIG = load_config("base", MODEL)
UPDATES = (2, 4, 6, 8)
LOSSES = {2: 3.0, 4: 2.0, 6: 4.0}
BIAS = "quantizer.projection.bias"


def content(update: int, config: Config = CONFIG) -> dict[str, Tensor]:
    """Another value at each update for each parameter, some of them -0; and of the optimizer, something."""
    generator = torch.Generator().manual_seed(update)
    tensors = {
        name: torch.randn(spec.shape, generator=generator)
        for name, spec in expected_of(config).items()
        if name.startswith("model.") or name.endswith("bias.step")
    }
    tensors[next(iter(tensors))].flatten()[:3] = -0.0
    return tensors


def save(run: Path, update: int, config: Config = CONFIG, tensors: dict[str, Tensor] | None = None) -> Path:
    validation = {"loss": LOSSES[update], "wer": 1.0 / update} if update in LOSSES else {}
    state = TrainState(update=update, audio_seconds=10.0 * update, data="3 hours", validation=validation)
    tensors = tensors or content(update, config)
    store = CheckpointStore(run / "checkpoints", Ranks(), expected=specs_of(tensors), keep_last=9)
    return store.save(tensors, state, dump_config(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 2, 4, 6 and 8, the first three with a validation loss."""
    run = tmp_path_factory.mktemp("made") / "run"
    for update in UPDATES:
        save(run, update)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "run", symlinks=True))


def refusal(run: Path, *arguments: object) -> str:
    """The one line with which the command ends; nothing is written."""
    before = sorted(run.parent.rglob("*"))
    result = CliRunner().invoke(app, ["checkpoint", "average", str(run), *map(str, arguments)])
    assert isinstance(result.exception, UserError), result.output
    assert sorted(run.parent.rglob("*")) == before
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_the_mean_is_that_of_float64(made: Path, tmp_path: Path) -> None:
    found = average(made, tmp_path / "out", last=3)
    assert [*found.scores] == [4, 6, 8]
    stored = whole(open_checkpoint(tmp_path / "out").model_tensors())
    originals = [content(update) for update in found.scores]
    assert {f"model.{name}" for name in stored} == {name for name in originals[0] if name.startswith("model.")}
    for name, tensor in stored.items():
        expected = sum(tensors[f"model.{name}"].numpy().astype(np.float64) for tensors in originals) / 3
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name


def test_the_best_are_ranked_by_the_metric_of_the_newest(made: Path, tmp_path: Path) -> None:
    """The metric of the run was changed: by `wer` the best are 4 and 6, by `loss` 2 and 4."""
    run = Path(shutil.copytree(made, tmp_path / "run", symlinks=True))
    for update in UPDATES:
        file = run / "checkpoints" / f"update_{update:08d}" / "config.yaml"
        by_wer = CONFIG.model_copy(update={"trainer": CONFIG.trainer.model_copy(update={"best_metric": "wer"})})
        file.write_text(dump_config(CONFIG if update == 8 else by_wer))
        seal(file.parent)
    found = average(run, tmp_path / "loss", best=2)
    assert (found.metric, found.scores) == ("loss", {2: 3.0, 4: 2.0})
    shutil.rmtree(run / "checkpoints" / "update_00000008")
    found = average(run, tmp_path / "wer", best=2)
    assert (found.metric, found.scores) == ("wer", {4: 1 / 4, 6: 1 / 6})


def test_a_damaged_checkpoint_is_named_once(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "update_00000006" / "train_state.json").write_text("{")
    said: list[str] = []
    assert [*average(run, tmp_path / "out", best=2, log=said.append).scores] == [2, 4]
    assert sum("update_00000006" in line for line in said) == 1


def test_what_cancels_in_fp32_is_not_lost(tmp_path: Path) -> None:
    for update, value in enumerate((2.0**30, 1.0, -(2.0**30)), start=1):
        tensors = content(update)
        tensors[f"model.{BIAS}"].fill_(value)
        save(tmp_path / "run", update, tensors=tensors)
    average(tmp_path / "run", tmp_path / "out", last=3)
    mean = whole(open_checkpoint(tmp_path / "out").model_tensors())[BIAS]
    assert torch.equal(mean, torch.full_like(mean, 1 / 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_not_committed(run: Path, tmp_path: Path, value: float) -> None:
    """This version does not write such checkpoints, but finds nothing wrong with the files of one."""
    change_committed(run / "checkpoints" / "update_00000006", lambda tensors, _: tensors[f"model.{BIAS}"].fill_(value))
    with pytest.raises(UserError, match=rf"(?m)^[^\n]*0008: not committed: model\.{BIAS} holds .* not finite[^\n]*$"):
        average(run, tmp_path / "out", last=2)
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "checkpoints"]


def test_of_one_checkpoint_it_is_its_weights_bit_for_bit(made: Path, tmp_path: Path) -> None:
    average(made, tmp_path, last=1)
    stored, original = whole(open_checkpoint(tmp_path).model_tensors()), content(8)
    assert all(
        tensor.numpy().tobytes() == original[f"model.{name}"].numpy().tobytes() for name, tensor in stored.items()
    )


def test_it_is_a_whole_checkpoint_of_the_newest_without_optimizer(made: Path, tmp_path: Path) -> None:
    path = average(made, tmp_path, best=2).checkpoint
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == path == tmp_path / "checkpoints" / "update_00000004"
    origin = "3 hours; the mean of the weights at updates 2, 4"
    assert checkpoint.state == TrainState(update=4, audio_seconds=40.0, data=origin)
    assert load_config(path / "config.yaml") == CONFIG
    assert verify(tmp_path).problems == []
    with pytest.raises(UserError, match=r"holds no optimizer state; start a run from its weights with"):
        checkpoint.read_into({"model.x": torch.zeros(1), "optim.x.step": torch.zeros(())})


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        (["--last", "2"], ["update 6", "update 8"]),
        (["--best", "1"], ["update 4: validation loss 2"]),
        (["--best", "2"], ["update 2: validation loss 3", "update 4: validation loss 2"]),
    ],
)
def test_the_command_says_what_it_took(options: list[str], printed: list[str], made: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "average", str(made), str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if not line.startswith("saved ")]
    assert lines[:-1] == printed
    count = len(printed)
    assert re.fullmatch(rf"{tmp_path}/checkpoints/update_\d+: the mean of {count} checkpoints?", lines[-1])


def test_what_cannot_be_used_is_skipped(run: Path, tmp_path: Path) -> None:
    next((run / "checkpoints" / "update_00000006").glob("*.safetensors")).unlink()
    said: list[str] = []
    assert [*average(run, tmp_path / "out", last=2, log=said.append).scores] == [4, 8]
    assert said[0].startswith("skipping unusable checkpoint: ") and "update_00000006" in said[0]
    shutil.rmtree(run / "checkpoints" / "update_00000004")
    assert refusal(run, tmp_path / "new", "--last", 3).endswith(
        "run: 3 usable checkpoints requested, but it has 2 (updates 2, 8)"
    )
    assert refusal(run, tmp_path / "new", "--best", 2).endswith(
        "run: 2 usable validated checkpoints requested, but it has 1 (update 2)"
    )


@pytest.mark.parametrize("options", [[], ["--last", 1, "--best", 1]])
def test_one_of_last_and_best_it_must_be(options: list[object], run: Path, tmp_path: Path) -> None:
    assert refusal(run, tmp_path / "out", *options).startswith("choose either --last N or --best N")


def test_no_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for option in ("--last", "--best"):
        assert refusal(run, tmp_path / "out", option, 1).endswith("requested, but it has 0")


def test_a_run_that_was_never_validated_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for update in (7, 8):
        save(run, update)
    assert refusal(run, tmp_path / "out", "--best", 1) == (
        f"{run}: none of its 2 checkpoints has the validation metric loss (trainer.best_metric); use --last N"
    )


def test_an_output_with_checkpoints_is_refused(run: Path, tmp_path: Path) -> None:
    assert refusal(run, run, "--last", 1) == f"{run / 'checkpoints'}: exists; choose another folder"
    average(run, tmp_path / "out", last=1)
    assert refusal(run, tmp_path / "out", "--last", 1).endswith("checkpoints: exists; choose another folder")


def drop_a_bias(tensors: dict[str, Tensor]) -> None:
    del tensors[f"model.{BIAS}"]


@pytest.mark.parametrize(
    ("overrides", "change", "name", "there", "before"),
    [
        (["model.layers=2"], None, "model.layers", "2", "1"),
        (["model.heads=2"], None, "model.heads", "2", "4"),  # no shape shows it
        (["objective.codebooks=1"], None, "objective.codebooks", "1", "2"),
        ([], drop_a_bias, f"model.{BIAS}", "None", "(32,)"),
    ],
)
def test_different_models_have_no_mean(
    overrides: list[str],
    change: Callable[[dict[str, Tensor]], None] | None,
    name: str,
    there: str,
    before: str,
    run: Path,
    tmp_path: Path,
) -> None:
    config = load_config("base", [*MODEL, *overrides])
    tensors = content(9, config)
    if change is not None:
        change(tensors)
    path = save(run, 9, config, tensors)
    message = f"{path}: {name} is {there}, in update_00000008 it is {before}: "
    message += "checkpoints of different models cannot be averaged"
    assert refusal(run, tmp_path / "out", "--last", 2) == message
