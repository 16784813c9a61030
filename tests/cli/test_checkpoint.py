"""`w2vscale checkpoint` on a run's own checkpoints: what it prints, and how it ends."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.tasks import train_micro
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective


@pytest.fixture(scope="module")
def trained(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates, with a checkpoint after each."""
    exp = tmp_path_factory.mktemp("trained") / "exp"
    train_micro(
        str(small_corpus.train), str(exp), ("trainer.updates=2", "schedule.warmup_updates=1", "checkpoint.every=1")
    )
    return exp


@pytest.fixture
def exp(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "exp", symlinks=True))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `w2vscale checkpoint …` in this process; returns what it printed."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        app(args=["checkpoint", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return call


def error_of(*arguments: object) -> str:
    """The one line with which a command ends."""
    with pytest.raises(UserError) as caught:
        app(args=["checkpoint", *map(str, arguments)], standalone_mode=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fields(printed: str) -> dict[str, str]:
    """The rows of the table that `show` prints."""
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in printed.splitlines()[1:])


@pytest.mark.parametrize("arguments", [[], ["show"], ["verify"], ["consolidate"], ["average"]])
def test_every_command_explains_itself(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["checkpoint", *arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/latest", "checkpoints/update_00000002"])
def test_show(trained: Path, run: Callable[..., str], place: str) -> None:
    printed = run("show", trained / place)
    assert printed.startswith(str(trained / "checkpoints" / "update_00000002"))
    found = fields(printed)
    parameters = dict(build_objective(load_config(trained / "config.yaml")).build_model().named_parameters())
    assert found["update"] == "2 of 2"
    assert found["parameters"] == f"{sum(tensor.numel() for tensor in parameters.values()):,}"
    assert found["shape"].startswith("3x32x64x4 ")
    assert found["written by"] == "ddp, 1 process"
    assert found["tensors"] == f"{len(parameters)} of the model, {3 * len(parameters)} of the optimizer"
    assert found["files"].startswith("2, ")


def test_show_lists_tensors(trained: Path, run: Callable[..., str]) -> None:
    lines = run("show", trained, "--tensors").splitlines()
    assert any(
        re.fullmatch(r" *model\.quantizer\.projection\.weight +32x16 +float32 +2,048 +1 *", line) for line in lines
    )
    assert sum(line.strip().startswith("optim.") for line in lines) == 3 * sum(
        line.strip().startswith("model.") for line in lines
    )


def test_verify_says_ok_on_one_line(trained: Path, run: Callable[..., str]) -> None:
    path = trained / "checkpoints" / "update_00000002"
    assert re.fullmatch(rf"OK {path}: update 2, \d+ tensors, 2 files, [\d.]+ kB\n", run("verify", trained))


def test_verify_ends_with_the_problem(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exp / "checkpoints" / "update_00000002"
    (path / "config.yaml").unlink()
    assert error_of("verify", exp) == f"{path}: config.yaml: missing"
    next(path.glob("*.safetensors")).write_bytes(b"")
    capsys.readouterr()
    assert error_of("verify", exp) == f"{path}: config.yaml: missing (and 1 more)"
    assert re.fullmatch(r"shard-\S+: has 0 bytes, expected \d+\n", capsys.readouterr().out)


def test_show_says_what_it_skips(exp: Path, run: Callable[..., str]) -> None:
    newest = exp / "checkpoints" / "update_00000002"
    (newest / "config.yaml").unlink()
    lines = run("show", exp).splitlines()
    assert lines[:2] == [
        f"skipping unusable checkpoint: {newest / 'config.yaml'}: missing",
        str(newest.with_name("update_00000001")),
    ]


def test_consolidate_writes_the_models_weights(trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    printed = run("consolidate", trained, tmp_path / "out")
    assert re.match(rf"{tmp_path}/out/model\.safetensors: update 2, \d+ tensors, ", printed)
    model = build_objective(load_config(tmp_path / "out" / "config.yaml")).build_model()
    open_checkpoint(trained).load_model(model)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    model.load_state_dict(weights, strict=False)


def test_consolidate_with_the_optimizer(trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("consolidate", trained, tmp_path, "--optimizer")
    found = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in found} == {"model", "optim"}
    assert found["optim.quantizer.projection.bias.step"] == 2.0
    assert "exists" in error_of("consolidate", trained, tmp_path)


@pytest.mark.parametrize("name", ["show", "verify", "consolidate"])
def test_what_is_no_checkpoint_is_one_line(name: str, tmp_path: Path, exp: Path) -> None:
    def error(path: Path) -> str:
        return error_of(name, path, *([tmp_path / "out"] if name == "consolidate" else []))

    assert error(tmp_path / "no") == f"{tmp_path / 'no'}: no such checkpoint"
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty") == f"{tmp_path / 'empty'}: not a checkpoint: it has no train_state.json"
    (tmp_path / "empty" / "checkpoints").mkdir()
    assert error(tmp_path / "empty").startswith(f"{tmp_path / 'empty'}: this run has no checkpoint yet")
    assert error(exp / "config.yaml") == f"{exp / 'config.yaml'}: no such checkpoint"
    state = exp / "checkpoints" / "update_00000002" / "train_state.json"
    state.write_text("{")
    assert error(state.parent).startswith(f"{state}: damaged (")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = f"{tmp_path / 'file'}: exists and is not an empty folder"
    assert error_of("consolidate", trained, tmp_path / "file").startswith(message)
    message = f"{tmp_path / 'file' / 'out'}: cannot be written: "
    assert error_of("consolidate", trained, tmp_path / "file" / "out").startswith(message)
