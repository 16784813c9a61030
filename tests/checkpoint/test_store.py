"""Checkpoint folders: committed whole, found newest first, never trusted blindly, never unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from w2vscale.checkpoint.store import CheckpointStore, TrainState, open_checkpoint, tensor_shapes
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.weight": torch.randn(7, 5, generator=generator) + value,
        "model.bias": torch.randn(3, generator=generator) + value,
        "optim.weight.step": torch.tensor(value),
    }


def store(folder: Path, **settings: int) -> CheckpointStore:
    return CheckpointStore(folder, Ranks(), **settings)


def save(folder: Path, update: int, **settings: int) -> Path:
    state = TrainState(update=update, audio_seconds=1.5 * update)
    return store(folder, **settings).save(tensors(float(update)), state, "model: {}\n")


def read(path: Path) -> dict[str, Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    open_checkpoint(path).read_into(into)
    return into


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "update_00000012"
    assert open_checkpoint(path).state == TrainState(update=12, audio_seconds=18.0)
    for name, tensor in read(path).items():
        assert torch.equal(tensor, tensors(12.0)[name])
    assert tensor_shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    assert (path / "config.yaml").read_text() == "model: {}\n"


def test_latest_is_a_link_to_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, keep_last=5)
    save(tmp_path, 2, keep_last=5)
    assert (tmp_path / "latest").resolve().name == "update_00000002"
    assert open_checkpoint(tmp_path / "latest").state.update == 2


def test_a_run_or_its_folder_of_checkpoints_means_its_newest(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 3)
    assert open_checkpoint(tmp_path).state.update == 3
    assert open_checkpoint(tmp_path / "checkpoints").state.update == 3


def test_keeps_the_last_and_every_multiple(tmp_path: Path) -> None:
    for update in range(1, 11):
        save(tmp_path, update, keep_last=2, keep_every=4)
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("update"))
    assert kept == [f"update_{update:08d}" for update in (4, 8, 9, 10)]


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}


def damage_truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def damage_header(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 64 + content[64:])


def damage_missing(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def damage_state(path: Path) -> None:
    (path / "train_state.json").write_text('{"format": 1, "update": ')


def damage_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def damage_settings(path: Path) -> None:
    (path / "config.yaml").unlink()


@pytest.mark.parametrize(
    "damage", [damage_settings, damage_truncate, damage_header, damage_missing, damage_state, damage_empty]
)
def test_falls_back_to_the_newest_that_is_whole(tmp_path: Path, damage) -> None:
    save(tmp_path, 1, keep_last=5)
    save(tmp_path, 2, keep_last=5)
    damage(save(tmp_path, 3, keep_last=5))
    said: list[str] = []
    found = store(tmp_path).find(said.append)
    assert found is not None
    assert found.state.update == 2
    assert len(said) == 1
    assert "update_00000003" in said[0]


def test_a_kill_while_writing_leaves_the_last_one_in_place(tmp_path: Path) -> None:
    """What is on disk at each moment of a save: a partial folder, later a renamed one without its link."""
    save(tmp_path, 1, keep_last=5)
    partial = tmp_path / ".update_00000002.partial"
    partial.mkdir()
    (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 1

    save(tmp_path, 2, keep_last=5)
    assert not partial.exists()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("update_00000001")
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 2


def test_saving_an_update_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert torch.equal(read(save(tmp_path, 1))["model.bias"], tensors(1.0)["model.bias"])


def test_no_checkpoint_is_no_error_for_a_new_run(tmp_path: Path) -> None:
    assert store(tmp_path / "nothing").find(print) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wanted: wanted | {"model.other": torch.zeros(2)}, "holds no tensor model.other"),
        (lambda wanted: wanted | {"model.bias": torch.zeros(4)}, r"model.bias is \[3\], the model wants \[4\]"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path: Path, change, message: str) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(UserError, match=message):
        checkpoint.read_into(change(tensors()))


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    document = json.loads((path / "train_state.json").read_text())
    (path / "train_state.json").write_text(json.dumps(document | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        open_checkpoint(path)


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        save(tmp_path / "file" / "checkpoints", 1)
    assert "\n" not in str(caught.value)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    for update in (100, 200, 300):
        save(tmp_path, update, keep_last=5)
    save(tmp_path, 150, keep_last=2)
    assert (tmp_path / "latest").resolve().name == "update_00000150"
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 150
    assert (tmp_path / "abandoned_update_00000300").is_dir()


def test_a_damaged_newest_never_costs_the_one_that_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 200, keep_last=5)
    damage_truncate(save(tmp_path, 300, keep_last=5))
    save(tmp_path, 250, keep_last=1)
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 250


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_in_silence(tmp_path: Path) -> None:
    damage_truncate(save(tmp_path, 1, keep_last=5))
    damage_missing(save(tmp_path, 2, keep_last=5))
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used"):
        store(tmp_path).find(lambda text: None)
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used"):
        open_checkpoint(tmp_path)
