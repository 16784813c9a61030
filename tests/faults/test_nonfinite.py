"""Gradients that are not finite: no rank steps, the run stops, and `replay` names the module that is to blame."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import change_committed
from tests.helpers.launched import Launched
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.format import committed
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.files import read_records
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.training.replay import kept_windows, replay
from w2vscale.training.train import train

LIMIT = 3
HUGE = "model.encoder.transformer.blocks.1.feed_forward.intermediate.weight"

SPOIL = """
import math
import os

if os.environ.get("RANK") == "1":
    from w2vscale.objectives.contrastive import Contrastive

    working = Contrastive.forward

    def spoiled(self, module, inputs, *, step, training):
        sums = working(self, module, inputs, step=step, training=training)
        return sums._replace(total=sums.total * math.inf) if training and step.update in SPOILED else sums

    Contrastive.forward = spoiled
"""
"""Makes the loss of rank 1 infinite in some updates, as a `sitecustomize`."""

SPOIL_GRADIENT = """
from w2vscale.objectives.contrastive import Contrastive

working = Contrastive.forward

def spoil(module, inputs, output):
    output.register_hook(lambda gradient: gradient * float("inf"))

def spoiled(self, module, inputs, *, step, training):
    if not (training and step.update >= 5 and step.numbers[0] % 4 == 3):
        return working(self, module, inputs, step=step, training=training)
    projection = next(one for name, one in module.named_modules() if name.endswith("feature_projection"))
    hook = projection.register_forward_hook(spoil)
    try:
        return working(self, module, inputs, step=step, training=training)
    finally:
        hook.remove()

Contrastive.forward = spoiled
"""
"""Makes a gradient infinite in the last micro-batch of an update, which is one of rank 1."""


@pytest.fixture(scope="module")
def stopped(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that starts from finite weights which overflow in every forward, and its error."""
    folder = tmp_path_factory.mktemp("nonfinite")
    settings = [*MICRO_RUN, f"data.train={small_corpus.train}", "schedule.warmup_updates=1"]
    assert train(load_config("base", [*settings, "trainer.updates=1"]), folder / "good") == 0
    (checkpoint,) = committed(folder / "good" / "checkpoints")
    change_committed(checkpoint, lambda tensors, offsets: tensors[HUGE].fill_(3e38))
    limits = (f"trainer.max_skipped_in_a_row={LIMIT}", "regularization.layerdrop=0", f"trainer.init_from={checkpoint}")
    with pytest.raises(UserError) as caught:
        train(load_config("base", [*settings, *limits]), folder / "bad")
    return folder / "bad", str(caught.value)


def window_of(error: str) -> Path:
    return Path(error.partition("w2vscale replay ")[2].partition(";")[0])


class TestReplay:
    def test_the_error_names_the_window(self, stopped: tuple[Path, str]) -> None:
        exp, error = stopped
        assert "\n" not in error
        assert error.startswith(
            f"{LIMIT} updates in a row had gradients that are not finite, the last is update {LIMIT};"
        )
        assert error.endswith("lower optim.lr (0.001) and start again")
        assert not committed(exp / "checkpoints")
        assert window_of(error) == exp / "nonfinite" / f"window_0000000{LIMIT - 1}_rank_0.safetensors"

    def test_it_names_the_module(self, stopped: tuple[Path, str]) -> None:
        window = window_of(stopped[1])
        found = replay(window)
        assert found.update == LIMIT
        # The weights of the last update: those it began with, because every update was skipped.
        kept = open_checkpoint(stopped[0] / "nonfinite").tensor(HUGE)
        assert torch.equal(kept, torch.full_like(kept, 3e38))
        assert found.problem is not None
        assert found.problem.startswith("the output of encoder.transformer.blocks.1.feed_forward.")
        assert found.micro_batches[0] == 4 * (LIMIT - 1)
        printed = CliRunner().invoke(app, ["replay", str(window)])
        assert printed.exit_code == 0
        assert " ".join(printed.stdout.split()) == (
            f"update {LIMIT}, 1 micro-batch from {4 * (LIMIT - 1)}: {found.problem}"
        )

    def test_good_weights_are_said_to_be_good(self, stopped: tuple[Path, str], tmp_path: Path) -> None:
        exp, error = stopped
        copy = tmp_path / "nonfinite"
        copy.mkdir()
        (copy / "window.safetensors").write_bytes(window_of(error).read_bytes())
        (good,) = committed(exp.parent / "good" / "checkpoints")
        change = open_checkpoint(good)
        assert not change.tensor(HUGE).isinf().any()
        (kept,) = committed(exp / "nonfinite")
        target = copy / kept.name
        target.mkdir()
        for file in kept.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        change_committed(target, lambda tensors, offsets: tensors[HUGE].normal_(0.0, 0.02))
        assert replay(copy / "window.safetensors").problem is None

    @pytest.mark.parametrize("content", [b"", b"text", None])
    def test_another_file_is_one_line(self, tmp_path: Path, stopped: tuple[Path, str], content: bytes | None) -> None:
        file = tmp_path / "window.safetensors"
        if content is None:
            (checkpoint,) = committed(stopped[0].parent / "good" / "checkpoints")
            file = next(checkpoint.glob("*.safetensors"))
        else:
            file.write_bytes(content)
        with pytest.raises(UserError, match="not a window that a run has kept") as caught:
            replay(file)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, about: about.update(numbers=[-1]),
            lambda tensors, about: about.update(numbers=[10**30]),
            lambda tensors, about: about.update(others={name: [] for name in about["others"]}),
            lambda tensors, about: about.update(others={name: [-5] for name in about["others"]}),
            lambda tensors, about: about.update(others={name: ["x"] for name in about["others"]}),
            lambda tensors, about: about.update(others={name: [10**9] for name in about["others"]}),
            lambda tensors, about: about.update(checkpoint="../../x"),
            lambda tensors, about: tensors.update({name: one.flatten() for name, one in tensors.items()}),
            lambda tensors, about: tensors.update({name: one.double() for name, one in tensors.items()}),
            lambda tensors, about: tensors.clear(),
        ],
    )
    def test_a_window_that_does_not_fit_is_one_line(
        self, stopped: tuple[Path, str], change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
    ) -> None:
        good = window_of(stopped[1])
        with safe_open(good, framework="pt") as file:
            about = json.loads(file.metadata()["window"])
        tensors = load_file(good)
        change(tensors, about)
        odd = good.with_name("window_odd.safetensors")
        save_file(tensors, odd, {"window": json.dumps(about)})
        with pytest.raises(UserError, match="not a window") as caught:
            replay(odd)
        assert "\n" not in str(caught.value)
        assert "pydantic" not in str(caught.value)


@pytest.mark.long
@pytest.mark.distributed
def test_one_rank_with_an_infinite_gradient_and_finite_losses(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss tells which rank it was, so the windows of all are kept."""
    settings = ("trainer.max_skipped_in_a_row=2", "checkpoint.every=2", "trainer.updates=40")
    with Launched(small_corpus.train, tmp_path, settings=settings, sitecustomize=SPOIL_GRADIENT) as run:
        code, errors = run.end()
    assert code == 2 and "Traceback" not in errors
    folder = tmp_path / "exp" / "nonfinite"
    assert f"the last is update 7; find the module with: w2vscale replay {folder};" in errors
    windows = kept_windows(folder)
    assert [file.name for file in windows] == [f"window_00000006_rank_{rank}.safetensors" for rank in range(2)]
    monkeypatch.setattr(Contrastive, "forward", Contrastive.forward)
    exec(SPOIL_GRADIENT, {})  # the same mistake in this process
    lines = CliRunner().invoke(app, ["replay", str(folder)]).stdout.split("window_")[1:]
    assert "rank_0.safetensors: update 7, 2 micro-batches from 24: everything is finite here" in lines[0]
    assert "rank_1.safetensors: update 7, 1 micro-batch from 27: the gradient for the output of" in lines[1]


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["name: ddp", "name: fsdp", "name: deepspeed, deepspeed_config: zero2"])
def test_one_rank_with_infinite_gradients(small_corpus: SmallCorpus, tmp_path: Path, engine: str) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    settings = (f"engine={{{engine}}}", "trainer.max_skipped_in_a_row=10", "checkpoint.every=2", "trainer.updates=40")
    spoil = SPOIL.replace("SPOILED", "{2, *range(5, 20)}")
    with Launched(small_corpus.train, tmp_path, settings=settings, sitecustomize=spoil) as run:
        code, errors = run.end()
    assert code == 2 and "Traceback" not in errors
    assert "10 updates in a row had gradients that are not finite, the last is update 15" in errors
    exp = tmp_path / "exp"
    records = [record for record in read_records(exp / "metrics.jsonl") if record["split"] == "train"]
    assert {record["update"]: record["skipped_updates"] for record in records[:7]} == {
        1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3,
    }  # fmt: skip
    windows = [*(exp / "nonfinite").glob("window_*")]
    assert [window.name for window in windows] == ["window_00000014_rank_1.safetensors"]
    assert str(windows[0]) in errors
    # The newest checkpoint is finite, and the update that was skipped on all ranks changed nothing.
    newest = committed(exp / "checkpoints")[-1]
    assert f"continue from {newest}, which is finite" in errors
    assert json.loads((newest / "train_state.json").read_text())["skipped_updates"] == 10
    assert replay(windows[0]).problem is None  # the mistake was that of the patched process
    assert load_file(windows[0])
