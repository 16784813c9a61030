"""Conversions that are killed: nothing looks whole, and the same command gives the whole result and no leftovers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.character_model import train_characters
from tests.helpers.fairseq import BASE, fairseq_state
from tests.helpers.fairseq2 import fairseq2_ctc_state, save_fairseq2
from tests.helpers.processes import ROOT
from tools.bench.convert import bytes_below
from w2vscale.checkpoint.verification import verify

sentencepiece = pytest.importorskip("sentencepiece")

SHARES = (0.0, 0.02, 0.3, 0.7, 0.97)
"""Of the output, above which a command is killed."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files by their paths, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "w2vscale", *map(str, arguments)], cwd=ROOT)


def run(*arguments: object) -> None:
    with command(*arguments) as process:
        assert process.wait(300) == 0


def kill(share: float, size: int, folder: Path, *arguments: object) -> None:
    """Kill a command when it has written more than this share of its output, of about `size` bytes, in `folder`."""
    with command(*arguments) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and bytes_below(folder) <= share * size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode < 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A CTC model of 380 MB with its tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_characters(folder / "tokenizer.model")
    symbols = len(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)))
    torch.manual_seed(1)
    yield save_fairseq2(folder / "model.pt", fairseq2_ctc_state(fairseq_state(BASE), BASE, symbols))
    shutil.rmtree(folder)


def test_an_import_that_is_killed_anywhere_is_repeated(source: Path, tmp_path: Path) -> None:
    names = {"tokenizer.model"} | {
        f"checkpoints/update_00000000/{name}"
        for name in ("config.yaml", "train_state.json", "shard-00001-model-00001-of-00001.safetensors")
    }
    for share in SHARES:
        kill(share, source.stat().st_size, tmp_path, "import", source, tmp_path / "in")
        assert not list(tmp_path.rglob("update_00000000"))
        run("import", source, tmp_path / "in")
        assert contents(tmp_path / "in").keys() == names
        assert not verify(tmp_path / "in").problems
        shutil.rmtree(tmp_path / "in")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["huggingface", "fairseq2"])
def test_an_export_that_is_killed_anywhere_is_repeated(form: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    run("import", source, tmp_path / "in")
    run("export", tmp_path / "in", folder / "whole", "--format", form)
    expected, size = contents(folder / "whole"), bytes_below(folder / "whole")
    shutil.rmtree(folder / "whole")
    for share in SHARES:
        kill(share, size, folder, "export", tmp_path / "in", folder / "out", "--format", form)
        assert not (folder / "out").exists()
        run("export", tmp_path / "in", folder / "out", "--format", form)
        assert contents(folder) == {f"out/{name}": checksum for name, checksum in expected.items()}
        shutil.rmtree(folder / "out")
    shutil.rmtree(tmp_path / "in")
