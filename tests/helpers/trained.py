"""A short run on a manifest."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.micro import MICRO_MODEL, MICRO_TRAINING
from w2vscale.config import load_config
from w2vscale.training.train import train


def trains(manifest: Path, exp: Path) -> None:
    """Five updates on all utterances of a manifest, none of which is left out."""
    settings = [*MICRO_TRAINING, *MICRO_MODEL, f"data.train={manifest}", "data.min_seconds=0.3", "trainer.updates=5"]
    assert train(load_config("base", settings), exp) == 0
    assert not (exp / "logs" / "bad_audio.jsonl").exists()
