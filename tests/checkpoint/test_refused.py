"""A checkpoint with a tensor missing, added, doubled or of another shape or type is never committed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoints import SHAPES, SPECS, expected_of_parameters, rewrite, save, store, tensors
from w2vscale.checkpoint import store as store_module
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["optim.bias.step"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.other"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["optim.bias.exp_avg"] = torch.zeros(4)


def round_off(tensors: dict[str, Tensor]) -> None:
    tensors["model.weight"] = tensors["model.weight"].bfloat16()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_symlink())


class TestWhatIsNotExpected:
    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (drop, "optim.bias.step: missing"),
            (add, "model.other: not a tensor of the model or its optimizer"),
            (reshape, "optim.bias.exp_avg: has the shape [4], expected [3]"),
            (round_off, "model.weight: has the type bfloat16, expected float32"),
        ],
    )
    def test_is_refused_before_anything_is_written(
        self, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], problem: str, asynchronous: bool
    ) -> None:
        save(tmp_path, 1)
        before, wrong = files_of(tmp_path), tensors(2.0)
        change(wrong)
        with pytest.raises(UserError) as caught:
            store(tmp_path, asynchronous=asynchronous).save(wrong, TrainState(update=2), "")
        assert str(caught.value) == (
            f"{tmp_path}/update_00000002: not committed: the state to save does not match the model and its "
            f"optimizer: {problem}; earlier checkpoints are unchanged"
        )
        assert files_of(tmp_path) == before
        assert open_checkpoint(tmp_path).state.update == 1

    def test_only_the_first_of_several_problems_is_named(self, tmp_path: Path) -> None:
        wrong = tensors()
        for change in (drop, add, reshape):
            change(wrong)
        with pytest.raises(UserError, match=r"optim.bias.exp_avg: has .*\(and 2 more problems\); earlier"):
            store(tmp_path).save(wrong, TrainState(update=2), "")

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda tensors, offsets: tensors.pop("optim.bias.step"), "optim.bias.step: missing"),
            (lambda tensors, offsets: (add(tensors), offsets.update({"model.other": [0]})), "model.other: not a "),
            (lambda tensors, offsets: reshape(tensors), "optim.bias.exp_avg: has the shape [4], expected [3]"),
            (lambda tensors, offsets: round_off(tensors), "model.weight: has the type bfloat16, expected float32"),
            (lambda tensors, offsets: offsets.update({"model.bias": [3]}), "model.bias: its slices leave a gap"),
        ],
    )
    def test_is_refused_after_it_was_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, problem: str, asynchronous: bool
    ) -> None:
        save(tmp_path, 1)
        spoil_what_is_written(monkeypatch, lambda file: rewrite(file, change))
        failing = store(tmp_path, asynchronous=asynchronous)

        def save_and_wait() -> None:
            failing.save(tensors(2.0), TrainState(update=2), "")
            failing.wait()

        with pytest.raises(UserError) as caught:
            save_and_wait()
        message = f"{tmp_path}/update_00000002: not committed: its files do not hold every expected tensor exactly once"
        assert str(caught.value).startswith(f"{message}: {problem}")
        assert "\n" not in str(caught.value)
        assert open_checkpoint(tmp_path).state.update == 1
        assert not (tmp_path / "update_00000002").exists()

    def test_twice_is_refused_after_it_was_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path, 1)

        def again(file: Path) -> None:
            twice = shutil.copy(file, file.with_name("shard-00001-model-00002-of-00002.safetensors"))
            rewrite(Path(twice), lambda tensors, offsets: [tensors.pop(name) for name in SPECS if name != "model.bias"])

        spoil_what_is_written(monkeypatch, again)
        with pytest.raises(UserError, match=r"once: model\.bias: its slices overlap; earlier checkpoints are"):
            store(tmp_path).save(tensors(2.0), TrainState(update=2), "")
        assert open_checkpoint(tmp_path).state.update == 1

    def test_a_file_that_is_damaged_is_not_committed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path, 1)
        spoil_what_is_written(monkeypatch, lambda file: file.write_bytes(b"\xff" * 64))
        with pytest.raises(UserError, match=r"a checkpoint cannot be written: .*damaged"):
            store(tmp_path).save(tensors(2.0), TrainState(update=2), "")
        assert open_checkpoint(tmp_path).state.update == 1

    def test_the_weights_alone_are_expected_of_a_model_alone(self, tmp_path: Path) -> None:
        weights = expected_of_parameters(SHAPES, optimizer=False)
        alone = CheckpointStore(tmp_path, Ranks(), expected=weights)
        with pytest.raises(UserError, match=r"optim\.weight\.exp_avg: not a tensor of the model"):
            alone.save(tensors(), TrainState(), "")
        alone.save({name: tensor for name, tensor in tensors().items() if name in weights}, TrainState(), "")
        assert open_checkpoint(tmp_path).specs == weights


def spoil_what_is_written(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]) -> None:
    """Change a checkpoint's file between torch's writing and the store's look at it."""
    writing = store_module.write_tensors

    def write_and_spoil(tensors: Any, folder: Path, group: Any) -> str | None:
        error = writing(tensors, folder, group)
        for file in folder.glob("*.safetensors"):
            spoil(file)
        return error

    monkeypatch.setattr(store_module, "write_tensors", write_and_spoil)
