"""Checkpoints that are written in the background."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.checkpoints import SPECS, save, store, tensors
from w2vscale.checkpoint import reader
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.errors import UserError
from w2vscale.optim.canonical import TensorSpec


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of these checkpoints describe a model with two parameters."""
    monkeypatch.setattr(reader, "expected_of", lambda config: SPECS)


class Held:
    """A store that writes in the background, but not before it is released."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.store = store(folder, keep_last=2, asynchronous=True, log=self.said.append)
        self._released = threading.Event()
        assert self.store._thread is not None
        self.store._thread.submit(self._released.wait)

    def save(self, update: int, state: dict[str, Tensor]) -> Path:
        return self.store.save(state, TrainState(update=update, audio_seconds=1.5 * update), "model: {}\n")

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    held = Held(tmp_path)
    yield held
    held.release()  # where the test failed: the interpreter would wait for it


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestInTheBackground:
    def test_the_tensors_are_those_of_a_synchronous_save(self, held: Held, tmp_path: Path) -> None:
        path = held.save(4, tensors(4.0))
        assert not path.exists()
        held.release()
        held.store.wait()
        expected = save(tmp_path / "synchronous", 4)
        assert {file.name for file in path.iterdir()} == {file.name for file in expected.iterdir()}
        for file in path.glob("*.safetensors"):  # in their headers, metadata has no order
            ours, theirs = load_file(file), load_file(expected / file.name)
            assert {name: tensor.numpy().tobytes() for name, tensor in ours.items()} == {
                name: tensor.numpy().tobytes() for name, tensor in theirs.items()
            }
        assert (tmp_path / "latest").resolve() == path
        assert len(held.said) == 1
        assert f"saved {path} in" in held.said[0] and "training waited" in held.said[0]

    def test_what_training_changes_afterwards_is_not_written(self, held: Held) -> None:
        state = tensors(1.0)
        path = held.save(1, state)
        for tensor in state.values():
            tensor.fill_(7.0)
        held.release()
        held.store.wait()
        for name, tensor in tensors(1.0).items():
            assert torch.equal(open_checkpoint(path).tensor(name), tensor)

    def test_one_is_written_before_the_next_begins(self, held: Held) -> None:
        held.save(1, tensors(1.0))
        held.release()
        held.save(2, tensors(2.0))
        assert open_checkpoint(held.store.folder / "update_00000001").state.update == 1
        held.store.wait()
        assert open_checkpoint(held.store.folder).state.update == 2

    def test_the_older_checkpoint_is_newest_until_all_is_written(self, held: Held, tmp_path: Path) -> None:
        save(tmp_path, 1)
        held.save(2, tensors(2.0))
        assert open_checkpoint(tmp_path).state.update == 1  # what a kill now would leave
        held.release()
        held.store.wait()
        assert open_checkpoint(tmp_path).state.update == 2

    def test_a_place_that_cannot_be_written_any_more(self, held: Held, tmp_path: Path) -> None:
        save(tmp_path, 1)
        held.save(2, tensors(2.0))
        assert not held.store.failed
        shutil.rmtree(tmp_path / ".update_00000002.partial")
        (tmp_path / ".update_00000002.partial").write_text("")
        held.release()
        with pytest.raises(UserError, match="cannot be written") as caught:
            held.store.wait()
        assert "\n" not in str(caught.value)
        assert open_checkpoint(tmp_path).state.update == 1
        held.store.wait()  # said once

    def test_a_full_disk_ends_the_next_save(self, held: Held, tmp_path: Path) -> None:
        save(tmp_path, 1)
        with full_disk(1_000_000):
            held.store.expected = {"model.weight": TensorSpec((500_000,))}
            held.save(2, {"model.weight": torch.zeros(500_000)})
            held.store.expected = SPECS
            held.release()
            with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
                held.save(3, tensors(3.0))
        assert open_checkpoint(tmp_path).state.update == 1
        held.save(3, tensors(3.0))
        held.store.wait()
        assert not list(tmp_path.glob(".*.partial"))
        assert open_checkpoint(tmp_path).state.update == 3

    def test_training_can_ask_whether_it_failed(self, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> str:
            raise ZeroDivisionError("a mistake of ours")

        monkeypatch.setattr(held.store, "_write", broken)
        held.save(1, tensors())
        assert not held.store.failed
        held.release()
        assert held.store._writing is not None
        held.store._writing.exception(timeout=10.0)
        assert held.store.failed
        with pytest.raises(ZeroDivisionError):
            held.store.wait()
        assert not held.store.failed
