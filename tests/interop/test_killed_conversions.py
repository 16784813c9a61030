"""Conversions that are killed: nothing incomplete looks whole, and the repeat gives the whole result and no leftovers.

A forked process kills itself before its n-th step, for every n: a step is any call that opens, makes, renames or
deletes something in the folder of the result, and each tensor that is read.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.character_model import train_characters
from tests.helpers.conversions import CONVERSIONS, Progress, ignore
from tests.helpers.fairseq import NARROW, Shape, fairseq_state
from tests.helpers.fairseq2 import fairseq2_ctc_state, our_settings, save_fairseq2
from w2vscale.checkpoint.verification import verify
from w2vscale.errors import UserError
from w2vscale.files import delete
from w2vscale.interop import exporting
from w2vscale.interop.importing import import_checkpoint

sentencepiece = pytest.importorskip("sentencepiece")

FORK = multiprocessing.get_context("fork")
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
"""Events of Python's audit hooks, whose first argument is a path."""
SHAPE = Shape(NARROW[:2], True, 1, 48, 96, 24, 20, entries=16, kernel=16, groups=4)
SHARD_BYTES = 60_000  # so that the model has several shards

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The import of a small CTC model of fairseq2, and in a folder of its own the model with its tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "fairseq2").mkdir()
    tokenizer = train_characters(folder / "fairseq2" / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    symbols = pieces.id_to_piece(list(range(len(pieces))))
    torch.manual_seed(1)
    state = fairseq2_ctc_state(fairseq_state(SHAPE), SHAPE, len(symbols))
    model = folder / "fairseq2" / "model.pt"
    save_fairseq2(model, state, w2vscale=our_settings(SHAPE, name="ctc", vocabulary=symbols))
    import_checkpoint(model, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files by their paths, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        delete(path)


def killed_at(step: int, folder: Path, work: Callable[[Progress], object]) -> bool:
    """Do some work in another process, which kills itself at a step. Returns whether it had so many."""
    process = FORK.Process(target=work_until, args=(step, folder, work))
    process.start()
    process.join(60)
    process.kill()  # if it hangs
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def work_until(step: int, folder: Path, work: Callable[[Progress], object]) -> None:
    steps = itertools.count(1)

    def pass_step() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in STEPS and str(arguments[0]).startswith(str(folder)):
            pass_step()

    torch.set_num_threads(1)  # the threads of the parent are not there
    sys.addaudithook(audit)
    work(lambda done, total: pass_step())


@pytest.mark.parametrize(
    "name",
    ["import fairseq2", "export huggingface", "export fairseq2", "export torchaudio", "consolidate", "average"],
)
def test_killed_at_any_step(name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", SHARD_BYTES)
    output = tmp_path / "out"
    is_checkpoint = name in ("import fairseq2", "average")

    def work(progress: Progress) -> object:
        return CONVERSIONS[name](run, output, progress)

    work(ignore)
    expected = contents(tmp_path)
    assert name != "export huggingface" or sum(".safetensors" in file for file in expected) > 3
    steps = finished = 0
    for steps in itertools.count():
        empty(tmp_path)
        if not killed_at(steps + 1, tmp_path, work):
            break
        if [*output.glob("checkpoints/update_*")] if is_checkpoint else output.exists():
            finished += 1
            assert expected.items() <= contents(tmp_path).items(), steps
            with pytest.raises(UserError, match="exists"):
                work(ignore)
        else:
            work(ignore)
            assert contents(tmp_path) == expected, steps
        assert not is_checkpoint or not verify(output).problems
    assert contents(tmp_path) == expected
    assert steps > 30 and finished < 10
