"""Checkpoints whose optimizer state is incomplete, as earlier versions committed them.

Their weights can be used, but no run is continued from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import change_committed, drop, expected_of_parameters
from tests.helpers.micro import MICRO_RUN
from tests.helpers.tasks import train_micro
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.consolidation import consolidate
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.verification import verify
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.optim.canonical import TensorSpec, optimizer_problem
from w2vscale.training.run import Run, build_run, stored_settings

SETTINGS = ("trainer.updates=4", "checkpoint.every=2", "checkpoint.keep_last=9", "model.layers=2")
BIAS = "quantizer.projection.bias"
INCOMPLETE = (
    "its optimizer state is incomplete (6 tensors of 2 parameters are missing, "
    "e.g. optim.encoder.mask_embedding.exp_avg)"
)
Resume = Callable[[str], tuple[Run, list[str]]]


@pytest.fixture(scope="module")
def trained(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 2 and 4."""
    exp = tmp_path_factory.mktemp("trained") / "exp"
    train_micro(str(small_corpus.train), str(exp), SETTINGS)
    return exp


@pytest.fixture
def exp(trained: Path, tmp_path: Path) -> Path:
    """A copy whose newest checkpoint lacks the state of two parameters."""
    exp = Path(shutil.copytree(trained, tmp_path / "exp", symlinks=True))
    assert len(drop(newest(exp), "optim.encoder.mask_embedding", f"optim.{BIAS}")) == 6
    return exp


@pytest.fixture
def resume(exp: Path, small_corpus: SmallCorpus) -> Resume:
    """Builds the run that continues, and what the log says."""

    def call(how: str) -> tuple[Run, list[str]]:
        said: list[str] = []
        config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}", *SETTINGS])
        run = build_run(config, exp, ranks=Ranks(), device=torch.device("cpu"), resume=how, log=said.append)
        return run, said

    return call


def newest(exp: Path) -> Path:
    return exp / "checkpoints" / "update_00000004"


def older(exp: Path) -> Path:
    return exp / "checkpoints" / "update_00000002"


def test_the_newest_whole_checkpoint_is_continued(exp: Path, resume: Resume) -> None:
    run, said = resume("auto")
    assert run.state.update == 2
    assert said[0] == f"skipping unusable checkpoint: {newest(exp)}: {INCOMPLETE}"
    assert said[-1] == f"resumed from {older(exp)} at update 2"
    assert stored_settings(exp, "auto") == older(exp) / "config.yaml"


def test_a_folder_of_checkpoints_is_searched_too(exp: Path, resume: Resume) -> None:
    run, said = resume(str(exp / "checkpoints"))
    assert run.state.update == 2
    assert said[0] == f"skipping unusable checkpoint: {newest(exp)}: {INCOMPLETE}"


def test_the_run_that_continues_is_the_uninterrupted_one(exp: Path, trained: Path, small_corpus: SmallCorpus) -> None:
    train_micro(str(small_corpus.train), str(exp), SETTINGS)
    assert verify(exp).problems == []
    ours, theirs = (whole(open_checkpoint(newest(path)).model_tensors()) for path in (exp, trained))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (exp / "checkpoints" / "abandoned_update_00000004").is_dir()


def test_naming_it_says_what_is_wrong_and_what_to_do(exp: Path, resume: Resume) -> None:
    message = (
        f"{newest(exp)}: {INCOMPLETE}; resume from an older checkpoint, or start a run from its weights with "
        f"trainer.init_from={newest(exp)}, in another --exp"
    )
    for attempt in (resume, lambda how: stored_settings(exp, how)):
        with pytest.raises(UserError) as caught:
            attempt(str(newest(exp)))
        assert str(caught.value) == message


def test_where_none_is_whole_the_weights_can_start_another_run(
    exp: Path, resume: Resume, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    drop(older(exp), "optim.encoder.mask_embedding.step")
    with pytest.raises(UserError) as caught:
        resume("auto")
    assert str(caught.value) == (
        f"{exp / 'checkpoints'}: no run can be resumed from its 2 checkpoints; start one from the "
        f"weights of the newest with trainer.init_from={newest(exp)}, in another --exp"
    )
    settings = (*SETTINGS, f"trainer.init_from={newest(exp)}")
    assert len(train_micro(str(small_corpus.train), str(tmp_path / "new"), settings)) == 4


def test_its_weights_can_be_used(exp: Path, trained: Path, tmp_path: Path) -> None:
    assert open_checkpoint(exp).state.update == 4
    weights = dict(load(exp).model.named_parameters())
    expected = whole(open_checkpoint(trained).model_tensors())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert consolidate(exp, tmp_path / "one").tensors == len(expected)
    assert [*average(exp, tmp_path / "mean", last=2).scores] == [2, 4]


def test_verification_names_what_is_missing(exp: Path) -> None:
    problems = verify(exp).problems
    assert len(problems) == 6
    assert problems[0] == "optim.encoder.mask_embedding.exp_avg: missing"
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(exp)])
    assert str(result.exception).endswith(": optim.encoder.mask_embedding.exp_avg: missing (and 5 more)")


def test_a_checkpoint_without_a_weight_is_damaged(trained: Path, tmp_path: Path) -> None:
    exp = Path(shutil.copytree(trained, tmp_path / "exp", symlinks=True))
    drop(newest(exp), f"model.{BIAS}")
    assert verify(exp).problems == [f"model.{BIAS}: missing"]
    with pytest.raises(UserError, match=rf"damaged: model\.{BIAS}: missing$"):
        open_checkpoint(newest(exp), resuming=True)
    with pytest.raises(UserError, match=rf"model\.{BIAS}: missing$"):
        consolidate(newest(exp), tmp_path / "one")


def test_a_checkpoint_without_any_state_gives_way_to_an_older_one(trained: Path, tmp_path: Path) -> None:
    exp = Path(shutil.copytree(trained, tmp_path / "exp", symlinks=True))
    drop(newest(exp), "optim.")
    assert open_checkpoint(exp).state.update == 4
    log: list[str] = []
    found = open_checkpoint(exp / "checkpoints", log.append, resuming=True)
    assert found.state.update == 2
    assert log == [f"skipping unusable checkpoint: {newest(exp)}: it holds no optimizer state"]


def test_a_checkpoint_with_a_hole_is_not_resumed_from(trained: Path, tmp_path: Path) -> None:
    exp = Path(shutil.copytree(trained, tmp_path / "exp", symlinks=True))
    moved = {f"model.{BIAS}": [1], f"optim.{BIAS}.exp_avg": [1], f"optim.{BIAS}.exp_avg_sq": [1]}
    change_committed(newest(exp), lambda tensors, offsets: offsets.update(moved))
    with pytest.raises(UserError, match=rf"model\.{BIAS}: its slices leave a gap"):
        open_checkpoint(newest(exp), resuming=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"optim.a.step": None}, "is incomplete (1 tensor of 1 parameter is missing, e.g. optim.a.step)"),
        ({"optim.a.step": (1,)}, "does not fit its model (optim.a.step: has the shape [1], expected [])"),
        ({"optim.b.exp_avg": (2,)}, "does not fit its model (optim.b.exp_avg: has the shape [2], expected [2, 3])"),
        ({"optim.c.step": ()}, "does not fit its model (optim.c.step: not a tensor of the model or its optimizer)"),
    ],
)
def test_the_state_must_be_that_of_every_weight(
    changes: dict[str, tuple[int, ...] | None], problem: str | None
) -> None:
    expected = expected_of_parameters({"a": (4,), "b": (2, 3)})
    changed = {name: TensorSpec(shape) for name, shape in changes.items() if shape is not None}
    found = {name: spec for name, spec in expected.items() if name not in changes} | changed
    assert optimizer_problem(found, expected) == (problem and f"its optimizer state {problem}")


def test_weights_alone_are_no_state() -> None:
    weights, both = (expected_of_parameters({"a": (4,)}, optimizer=optimizer) for optimizer in (False, True))
    assert optimizer_problem(weights, both) == "it holds no optimizer state"
