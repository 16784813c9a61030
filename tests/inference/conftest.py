"""A run to load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import load_config
from w2vscale.training.train import train


@pytest.fixture(scope="package")
def run(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("run")
    config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=4"])
    train(config, exp)
    return exp
