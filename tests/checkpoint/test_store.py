"""Checkpoint folders: committed whole, found newest first, never trusted blindly, never unpickled."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoints import SPECS, save, store, tensors
from w2vscale.checkpoint import reader
from w2vscale.checkpoint import store as store_module
from w2vscale.checkpoint.format import TrainState, file_facts
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of these checkpoints describe a model with two parameters."""
    monkeypatch.setattr(reader, "expected_of", lambda config: SPECS)


def read(path: Path) -> dict[str, Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    open_checkpoint(path).read_into(into)
    return into


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "update_00000012"
    checkpoint = open_checkpoint(path)
    assert checkpoint.state == TrainState(update=12, audio_seconds=18.0)
    assert checkpoint.ranks == 1
    assert checkpoint.files == {
        file.name: file_facts(file) for file in path.iterdir() if file.name != "train_state.json"
    }
    for name, tensor in read(path).items():
        assert torch.equal(tensor, tensors(12.0)[name])
    assert checkpoint.specs == SPECS
    assert (path / "config.yaml").read_text() == "model: {}\n"


def test_one_process_is_no_reason_to_warn(tmp_path: Path) -> None:
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(save(tmp_path, 1))
    assert [str(warning.message) for warning in caught] == []
    assert warnings.filters == filters


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


def test_keeps_the_best_that_were_validated(tmp_path: Path) -> None:
    losses = {1: 4.0, 2: 2.0, 3: None, 4: 2.0, 5: 3.0, 6: None, 7: 5.0}
    for update, loss in losses.items():
        state = TrainState(update=update, validation={} if loss is None else {"loss": loss})
        store(tmp_path, keep_best=2, keep_every=3).save(tensors(), state, "")
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("update"))
    assert kept == [f"update_{update:08d}" for update in (2, 3, 4, 6, 7)]

    damage_state(tmp_path / "update_00000004")
    store(tmp_path, keep_best=2).save(tensors(), TrainState(update=8, validation={"loss": 6.0}), "")
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("update"))
    assert kept == [f"update_{update:08d}" for update in (2, 7, 8)]


def earlier_format(file: Path) -> dict[str, Any]:
    """The content of train_state.json as it was before it had a checksum of its own."""
    content: dict[str, Any] = {**json.loads(file.read_text()), "format": 2}
    del content["sha256"]
    return content


@pytest.mark.parametrize("validation", [None, [1], "x", {"loss": None}, {"loss": "3"}, {"loss": math.nan}, {"a": {}}])
def test_damaged_validation_metrics_are_named(validation: object, tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "train_state.json"
    file.write_text(json.dumps(earlier_format(file) | {"validation": validation}))
    with pytest.raises(UserError, match=r"train_state\.json: damaged"):
        open_checkpoint(file.parent)


def test_the_best_by_loss_are_kept_until_there_are_others(tmp_path: Path) -> None:
    """After `trainer.best_metric` was changed."""
    for update, validation in enumerate([{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0, "wer": 0.5}, {}], start=1):
        state = TrainState(update=update, validation=validation)
        store(tmp_path, keep_best=2, best_metric="wer").save(tensors(), state, "")
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("update"))
    assert kept == [f"update_{update:08d}" for update in (1, 3, 4)]


def test_a_validation_loss_of_earlier_versions_is_read(tmp_path: Path) -> None:
    for stored, expected in ((2.5, {"loss": 2.5}), (None, {})):
        file = save(tmp_path, 1) / "train_state.json"
        content = earlier_format(file)
        del content["validation"]
        file.write_text(json.dumps({**content, "validation_loss": stored}))
        assert open_checkpoint(file.parent).state.validation == expected


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
    shutil.copytree(tmp_path / "update_00000001", tmp_path / ".update_00000003.partial")  # killed before its rename
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 1

    save(tmp_path, 2, keep_last=5)
    assert not list(tmp_path.glob(".*.partial"))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("update_00000001")
    found = store(tmp_path).find(print)
    assert found is not None
    assert found.state.update == 2


def test_saving_an_update_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert torch.equal(read(save(tmp_path, 1))["model.bias"], tensors(1.0)["model.bias"])


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_while_a_checkpoint_is_committed_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """As in a roll back from update 4 to 2: the later ones are set aside, and update 2 gets another state."""
    folder = tmp_path / "checkpoints"
    for update in (1, 2, 3, 4):
        save(folder, update, keep_last=4)
    again = store(folder, keep_last=4)
    assert again.find(print, up_to=2) is not None
    left = [renames]
    rename = Path.rename

    def rename_or_die(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_or_die)
        with suppress(KeyboardInterrupt):
            again.save(tensors(2.0), TrainState(update=2, skipped_windows=2), "model: {}\n")
    found = store(folder).find(print)
    assert found is not None
    assert found.state.update == {0: 4, 1: 3, 2: 2}.get(renames, 2)
    assert found.state.skipped_windows == (2 if renames > 3 else 0)
    assert store(folder).find(print, up_to=2).state.update == 2  # type: ignore[union-attr]
    assert not [*folder.glob("replaced_*")]


def test_a_file_that_has_the_name_of_the_next_checkpoint_is_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for update, make in ((2, Path.touch), (3, lambda path: path.symlink_to("nowhere"))):
        make(tmp_path / f"update_{update:08d}")
        assert save(tmp_path, update).is_dir()
        assert os.path.lexists(tmp_path / f"abandoned_update_{update:08d}")
    assert open_checkpoint(tmp_path).state.update == 3


def test_a_state_of_thirty_gigabytes_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2, keep_last=2) / "train_state.json", 30 * 10**9)
    log: list[str] = []
    assert open_checkpoint(tmp_path, log.append).state.update == 1
    assert "train_state.json: damaged (ValueError: has 30000000000 bytes)" in log[0]


def test_no_checkpoint_is_no_error_for_a_new_run(tmp_path: Path) -> None:
    assert store(tmp_path / "nothing").find(print) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda wanted: wanted | {"model.other": torch.zeros(2)},
            "model.other: missing; the checkpoint is of another model",
        ),
        (
            lambda wanted: wanted | {"model.bias": torch.zeros(4)},
            r"model.bias: has the shape \[3\], expected \[4\]; the",
        ),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path: Path, change, message: str) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(UserError, match=message):
        checkpoint.read_into(change(tensors()))


@pytest.mark.parametrize(
    "document", [{"format": 4, "files": []}, {"format": 1, "update": 1, "files": {"config.yaml": 10}}]
)
def test_another_format_is_refused(tmp_path: Path, document: dict[str, object]) -> None:
    path = save(tmp_path, 1)
    (path / "train_state.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"format {document['format']}; this version of w2vscale reads format 3"):
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


def test_checkpoints_that_were_all_set_aside_do_not_start_a_run_anew_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 300).rename(tmp_path / "abandoned_update_00000300")
    with pytest.raises(UserError, match=r"all checkpoints were set aside; use --resume .*_00000300, or"):
        store(tmp_path).find(print)
    assert open_checkpoint(tmp_path / "abandoned_update_00000300").state.update == 300


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


def test_what_cannot_be_deleted_is_said_and_does_not_fail_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, while another process reads an old checkpoint."""
    save(tmp_path, 1)
    said: list[str] = []

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(store_module.shutil, "rmtree", busy)
        store(tmp_path, log=said.append).save(tensors(2.0), TrainState(update=2), "")
    assert open_checkpoint(tmp_path).state.update == 2
    assert "update_00000001: cannot be deleted" in said[0]
    save(tmp_path, 3)
    assert not (tmp_path / "update_00000001").exists()


def test_a_rank_that_cannot_read_its_file_back_fails_the_checkpoint_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    monkeypatch.setattr(CheckpointStore, "_on_main_from_all", lambda *arguments: [arguments[1], "Input/output error"])
    with pytest.raises(UserError, match=r"cannot be written: .*Input/output error"):
        CheckpointStore(tmp_path, Ranks(0, 0, 2), expected=SPECS).save(tensors(2.0), TrainState(update=2), "")
    assert open_checkpoint(tmp_path).state.update == 1
