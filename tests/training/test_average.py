"""A run with `optim.ema_decay`: what it validates, what its checkpoints hold, and who uses the averaged weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import drop
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.files import read_metrics
from w2vscale.inference.pretrained import load
from w2vscale.training.train import train
from w2vscale.training.warm_start import open_source

MASK = "encoder.mask_embedding"
SETTINGS = (
    *MICRO_RUN, "data.max_seconds=1", "batch.max_seconds=3", "batch.micro_batches=1", "trainer.updates=4",
    "schedule.warmup_updates=1", "trainer.validate_every=2", "checkpoint.every=2",
)  # fmt: skip
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def settings(small_corpus: SmallCorpus) -> list[str]:
    return [*SETTINGS, f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}"]


@pytest.fixture(scope="module")
def averaged(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average, of four updates."""
    exp = tmp_path_factory.mktemp("averaged") / "exp"
    assert train(load_config("base", [*settings, "optim.ema_decay=0.75"]), exp) == 0
    return exp


@pytest.fixture(scope="module")
def plain(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an average."""
    exp = tmp_path_factory.mktemp("plain") / "exp"
    assert train(load_config("base", settings), exp) == 0
    return exp


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process; returns what it printed, in one line."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        app(args=[*map(str, arguments)], standalone_mode=False)
        return " ".join(capsys.readouterr().out.split())

    return call


def at(exp: Path, update: int) -> CheckpointReader:
    return open_checkpoint(exp / "checkpoints" / f"update_{update:08d}")


def own(checkpoint: CheckpointReader, kind: str) -> dict[str, Tensor]:
    names = [name for name in checkpoint.tensors if name.startswith(f"{kind}.")]
    return {name.removeprefix(f"{kind}."): checkpoint.tensor(name) for name in names}


def test_validation_changes_nothing_but_its_metrics(averaged: Path, plain: Path) -> None:
    """Two validations of the averaged weights, and the training is that without an average, bit for bit."""
    for update in (2, 4):
        with_average, without = at(averaged, update), at(plain, update)
        assert [n for n in without.tensors if not with_average.tensor(n).equal(without.tensor(n))] == []
    curves = [read_metrics(exp / "metrics.jsonl", "train") for exp in (averaged, plain)]
    assert [line["loss"] for line in curves[0]] == [line["loss"] for line in curves[1]]


def test_validation_is_that_of_the_averaged_weights(averaged: Path, plain: Path, small_corpus: SmallCorpus) -> None:
    lines: list[str] = []
    found, raw, other = (
        evaluate_checkpoint(exp, [small_corpus.validation], weights=weights, log=lines.append)
        for exp, weights in ((averaged, None), (averaged, "raw"), (plain, None))
    )
    assert found is not None and raw is not None and other is not None
    (_, last) = read_metrics(averaged / "metrics.jsonl", "validation")
    assert last["loss"] == at(averaged, 4).state.validation["loss"] == pytest.approx(found.metrics["loss"], rel=1e-6)
    assert raw.metrics == other.metrics
    assert abs(raw.metrics["loss"] - found.metrics["loss"]) > 1e-5
    assert lines == [
        "evaluating the averaged weights (optim.ema_decay=0.75)", "evaluating the weights of the last update",
    ]  # fmt: skip


def test_readers_use_the_averaged_weights(averaged: Path, plain: Path) -> None:
    checkpoint = at(averaged, 4)
    average, raw = own(checkpoint, "ema"), own(checkpoint, "model")
    assert average.keys() == dict(load(averaged).model.named_parameters()).keys()
    assert not average[MASK].equal(raw[MASK])
    for weights, expected in ((None, average), ("ema", average), ("raw", raw)):
        assert load(averaged, weights=weights).model.encoder.mask_embedding.equal(expected[MASK])
        assert checkpoint.model_tensors(weights)[MASK].whole().equal(expected[MASK])
    lines: list[str] = []
    assert open_source(averaged, lines.append).tensors[MASK].whole().equal(average[MASK])
    assert lines == [f"starting from {checkpoint.path}: its averaged weights"]
    with pytest.raises(UserError, match="has no averaged weights"):
        load(plain, weights="ema")
    with pytest.raises(UserError, match="weights=both: choose ema or raw"):
        load(averaged, weights="both")


@pytest.mark.parametrize(("options", "kind"), [((), "ema"), (("--weights", "raw"), "model")])
def test_export(
    averaged: Path, tmp_path: Path, command: Callable[..., str], options: tuple[str, ...], kind: str
) -> None:
    printed = command("export", averaged, tmp_path / "out", *options)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = own(at(averaged, 4), kind)
    assert exported["wav2vec2.masked_spec_embed"].equal(expected[MASK])
    assert exported["quantizer.codevectors"].flatten().equal(expected["quantizer.codevectors"].flatten())
    assert ("averaged weights (optim.ema_decay=0.75)" in printed) == (kind == "ema")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("| weights | averaged weights (optim.ema_decay=0.75) |\n" in card) == (kind == "ema")
    assert ("| validation contrastive accuracy |" in card) == (kind == "ema"), "the run validates the averaged weights"


def test_commands_on_checkpoints(averaged: Path, plain: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    checkpoint = at(averaged, 4)
    count = len(own(checkpoint, "ema"))
    assert f"averaged weights {count} tensors, optim.ema_decay=0.75" in command("checkpoint", "show", averaged)
    assert "averaged weights" not in command("checkpoint", "show", plain)
    assert command("checkpoint", "verify", averaged).startswith("OK ")

    command("checkpoint", "consolidate", averaged, tmp_path / "one")
    command("checkpoint", "consolidate", averaged, tmp_path / "raw", "--weights", "raw")
    command("checkpoint", "consolidate", averaged, tmp_path / "all", "--optimizer")
    one, raw, everything = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "raw", "all"))
    assert one[MASK].equal(checkpoint.tensor(f"ema.{MASK}")) and raw[MASK].equal(checkpoint.tensor(f"model.{MASK}"))
    assert everything.keys() == checkpoint.tensors.keys()
    with pytest.raises(UserError, match="--weights raw: leave it out"):
        command("checkpoint", "consolidate", averaged, tmp_path / "x", "--optimizer", "--weights", "raw")

    for options, kind in (((), "ema"), (("--weights", "raw"), "model")):
        command("checkpoint", "average", averaged, tmp_path / kind, "--last", "2", *options)
        mean = open_checkpoint(tmp_path / kind)
        assert not mean.has_average
        two = [at(averaged, update).tensor(f"{kind}.{MASK}").double() for update in (2, 4)]
        assert mean.tensor(f"model.{MASK}").equal((sum(two) / 2).float())
        assert ("averaged weights" in mean.state.data) == (kind == "ema")


def test_a_checkpoint_without_part_of_the_average_is_unusable(averaged: Path, tmp_path: Path) -> None:
    exp = Path(shutil.copytree(averaged, tmp_path / "exp", symlinks=True))
    newest = exp / "checkpoints" / "update_00000004"
    assert drop(newest, f"ema.{MASK}") == [f"ema.{MASK}"]
    lines: list[str] = []
    assert open_checkpoint(exp, lines.append, resuming=True).state.update == 2
    assert lines == [f"skipping unusable checkpoint: {newest}: ema.{MASK}: missing"]
    with pytest.raises(UserError, match=re.escape(f"{newest}: ema.{MASK}: missing")):
        load(newest)


def resumed(
    exp: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[Path, str]:
    """Resume a run from its second update in another folder; also what was printed."""
    capsys.readouterr()
    checkpoint = str(exp / "checkpoints" / "update_00000002")
    assert train(load_config("base", [*settings, *more]), tmp_path / "exp", resume=checkpoint) == 0
    return tmp_path / "exp", " ".join(capsys.readouterr().out.split())


def test_a_run_resumes_from_a_checkpoint_without_an_average(
    plain: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average starts from the weights of the checkpoint."""
    exp, printed = resumed(plain, settings, tmp_path, capsys, "optim.ema_decay=0.75", "checkpoint.every=1")
    assert (
        "optim.ema_decay=0.75: the checkpoint has no averaged weights; the average starts from its weights" in printed
    )
    weights = [at(run, update).tensor(f"model.{MASK}").double() for run, update in ((plain, 2), (exp, 3), (exp, 4))]
    expected = 0.75 * (0.75 * weights[0] + 0.25 * weights[1]) + 0.25 * weights[2]
    torch.testing.assert_close(at(exp, 4).tensor(f"ema.{MASK}").double(), expected, rtol=1e-6, atol=1e-9)


def test_a_run_without_an_average_drops_that_of_its_checkpoint(
    averaged: Path, plain: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp, printed = resumed(averaged, settings, tmp_path, capsys)
    assert "optim.ema_decay=0: the averaged weights of the checkpoint are dropped" in printed
    found, expected = at(exp, 4), at(plain, 4)
    assert found.tensors.keys() == expected.tensors.keys()
    assert [name for name in expected.tensors if not found.tensor(name).equal(expected.tensor(name))] == []
