"""A command in this process, and a manifest that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from w2vscale.cli.app import app
from w2vscale.data.manifest import index_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process and returns its output."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


@pytest.fixture
def corpus(small_corpus: SmallCorpus, tmp_path: Path) -> Path:
    """A copy of the manifest of the small corpus."""
    path = Path(shutil.copy(small_corpus.train, tmp_path / "cuts.jsonl"))
    shutil.copy(index_path(small_corpus.train), index_path(path))
    return path
