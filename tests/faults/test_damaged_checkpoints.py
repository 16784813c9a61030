"""Whatever happens to the files of the newest checkpoint, no run continues from damaged data without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_verification import CONFIG, content, shard, spread
from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import seal
from tests.helpers.launched import Launched
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import FORMAT, TrainState, committed, encode, folder_name, read_document
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError

OLDER, NEWER = 3, 4


def flip(file: Path, byte: int, bit: int = 0) -> None:
    """Flip one bit. `byte` counts from the end if it is negative."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda file, other: file.write_bytes(file.read_bytes()[:-2]),
    "emptied": lambda file, other: file.write_bytes(b""),
    "a bit at the start": lambda file, other: flip(file, 0),
    "a bit of the header": lambda file, other: flip(file, 20),
    "a bit in the middle": lambda file, other: flip(file, file.stat().st_size // 2, 6),
    "a bit at the end": lambda file, other: flip(file, -2, 3),
    "zeros in place of a block": lambda file, other: zero(file),
    "removed": lambda file, other: file.unlink(),
    "a folder": lambda file, other: (file.unlink(), file.mkdir()),
    "that of another update": lambda file, other: shutil.copy(other, file),
}
"""What happens to `file`, of which `other` is the one of an older checkpoint."""


def zero(file: Path) -> None:
    """Zero a block, as a file system does that has lost it."""
    data = bytearray(file.read_bytes())
    data[-200:] = bytes(len(data[-200:]))
    file.write_bytes(data)


def damaged(run: Path, name: str, how: str) -> Path:
    """Damage a file of the newest checkpoint of a run; returns that checkpoint."""
    older, newer = committed(run / "checkpoints")
    DAMAGES[how](newer / name, older / name)
    return newer


def find(run: Path, log: list[str]) -> int | None:
    """The update that a run would be resumed from."""
    store = CheckpointStore(run / "checkpoints", Ranks(), expected=expected_of(CONFIG))
    found = store.find(log.append)
    return found and found.state.update


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, each in three files with tensors."""
    run = tmp_path_factory.mktemp("made")
    for update in (OLDER, NEWER):
        path = spread(run / "checkpoints" / "new", {name: value + update for name, value in content().items()})
        (path / "config.yaml").write_text((path / "config.yaml").read_text() + f"# {update}\n")
        seal(path, update=update)
        path.rename(path.with_name(folder_name(update)))
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run", symlinks=True))


FILES = ("train_state.json", "config.yaml", *(shard(Path(), number).name for number in (1, 2, 3)))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed(run: Path, name: str, how: str) -> None:
    newer = damaged(run, name, how)
    log: list[str] = []
    assert find(run, log) == OLDER
    assert len(log) == 1 and log[0].startswith(f"skipping unusable checkpoint: {newer}")
    assert "\n" not in log[0]
    assert open_checkpoint(run).state.update == OLDER  # for evaluation and export, too
    with pytest.raises(UserError, match=str(newer)) as caught:
        open_checkpoint(newer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("byte", range(0, 60, 5))
def test_every_bit_of_the_first_bytes_of_the_state_counts(run: Path, byte: int) -> None:
    """Among them the format and the update."""
    newer = run / "checkpoints" / folder_name(NEWER)
    whole = (newer / "train_state.json").read_bytes()
    for bit in range(8):
        flip(newer / "train_state.json", byte, bit)
        assert find(run, []) == OLDER, (byte, bit)
        (newer / "train_state.json").write_bytes(whole)
    assert find(run, []) == NEWER


def test_a_file_outside_the_checkpoint(run: Path) -> None:
    newer = run / "checkpoints" / folder_name(NEWER)
    last = shard(newer, 3)
    last.rename(newer.parent / last.name)
    document = read_document(newer)
    files = {**document.files, f"../{last.name}": document.files[last.name]}
    del files[last.name]
    (newer / "train_state.json").write_text(encode(replace(document, files=files)))
    log: list[str] = []
    assert find(run, log) == OLDER
    assert f"'../{last.name}' is not the name of a file in the folder" in log[0]


def test_all_files_of_another_update(run: Path) -> None:
    older, newer = committed(run / "checkpoints")
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    log: list[str] = []
    assert find(run, log) == OLDER
    assert f"it is of update {OLDER}" in log[0]


def test_a_file_that_was_not_written_with_the_others(run: Path) -> None:
    newer = run / "checkpoints" / folder_name(NEWER)
    shutil.copy(shard(newer, 1), newer / "shard-00004-model-00001-of-00001.safetensors")
    log: list[str] = []
    assert find(run, log) == OLDER
    assert log[0].endswith("shard-00004-model-00001-of-00001.safetensors: not listed in train_state.json")


def test_the_same_state_with_other_numbers(run: Path) -> None:
    """What an editor may do: valid JSON, and not what was written."""
    file = run / "checkpoints" / folder_name(NEWER) / "train_state.json"
    text = file.read_text()
    assert f'"format": {FORMAT}' in text
    for old, new in (('"audio_seconds": 7200.0', '"audio_seconds": 7201.0'), (f'"format": {FORMAT}', '"format": 2')):
        file.write_text(text.replace(old, new))
        assert find(run, []) == OLDER
        file.write_text(text)


def test_if_all_are_damaged_no_new_run_is_started(run: Path) -> None:
    for path in committed(run / "checkpoints"):
        flip(shard(path, 2), -2)
    log: list[str] = []
    with pytest.raises(UserError, match=r"none of its 2 checkpoints can be used; move them away to start a new run"):
        find(run, log)
    assert len(log) == 2 and all(line.endswith("its content is not what was written (SHA-256)") for line in log)


def test_a_damaged_checkpoint_that_is_named_is_not_replaced_by_another(run: Path) -> None:
    newer = damaged(run, FILES[-1], "a bit at the end")
    store = CheckpointStore(run / "checkpoints", Ranks(), expected=expected_of(CONFIG))
    with pytest.raises(UserError, match=r"00003-.*: its content is not what was written \(SHA-256\)"):
        store.find(print, newer)


def test_a_weight_that_is_not_finite_is_not_committed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Ranks(), expected=expected_of(CONFIG))
    tensors = content()
    for update, value in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
        spoiled = {**tensors, "optim.quantizer.projection.bias.exp_avg_sq": torch.full((32,), value)}
        with pytest.raises(UserError, match=rf"0{update}: not committed: .*exp_avg_sq holds .* not finite"):
            store.save(spoiled, TrainState(update=update), "")
        assert not committed(tmp_path) and not [*tmp_path.glob(".*")]
    store.save(tensors, TrainState(update=4), "")
    with pytest.raises(UserError, match=rf"lower optim\.lr and resume from {tmp_path}/update_00000004"):
        store.save(spoiled, TrainState(update=5), "")


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_run_of_two_processes_continues_from_the_newest_intact_one(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    settings = ("engine.name=fsdp", "trainer.updates=4", "checkpoint.every=2", "checkpoint.keep_last=2")
    with Launched(small_corpus.train, tmp_path, settings=settings) as run:
        run.finish(120.0)
    exp = tmp_path / "exp"
    before = whole(open_checkpoint(exp).model_tensors())
    names = sorted(path.name for path in (exp / "checkpoints" / folder_name(4)).iterdir())
    assert [Path(name).suffix for name in names] == [".yaml", ".safetensors", ".safetensors", ".json"]
    newer = damaged(exp, names[2], "a bit at the end")
    # With the same settings there is nothing to do, and no checksums are compared (training/finished.py).
    with Launched(small_corpus.train, tmp_path, settings=(*settings, "checkpoint.grace_seconds=61")) as run:
        printed = run.finish(120.0)
    assert f"skipping unusable checkpoint: {newer}" in printed
    assert "at update 2\n" in printed
    again = open_checkpoint(exp)
    assert again.state.update == 4
    assert all(torch.equal(tensor, before[key]) for key, tensor in whole(again.model_tensors()).items())
