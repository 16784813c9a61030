"""A run that is killed after each of its updates in turn, and continued by the same command, is the untouched run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.distributed.test_whole_checkpoints import assert_same_bits, assert_whole, settings
from tests.helpers.audio import SmallCorpus
from tests.helpers.launched import HOLD, Launched

KILLS = 2
UPDATES = KILLS + 1
"""The last update is for a run that is killed after the one before."""

pytestmark = [pytest.mark.distributed, pytest.mark.long]
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_after_each_update(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """Every second kill waits until the checkpoint is there; the others meet it half written, or not begun."""
    overrides = settings(small_corpus, "zero3", updates=UPDATES)

    def launched(name: str, *, hold: int | None = None) -> Launched:
        (tmp_path / name).mkdir(exist_ok=True)
        return Launched(small_corpus.train, tmp_path / name, settings=overrides, sitecustomize=HOLD, hold=hold)

    with launched("whole") as run:
        run.finish(120.0)
    whole, killed = tmp_path / "whole" / "exp", tmp_path / "killed" / "exp"
    assert_whole(whole, updates=UPDATES)
    for update in range(1, KILLS + 1):
        newest = killed / "checkpoints" / f"update_{update:08d}" if update % 2 == 0 else None
        with launched("killed", hold=update) as run:
            printed = run.kill_once_held(committed=newest)
        assert "skipping unusable checkpoint" not in printed
    with launched("killed") as run:
        assert f"at update {KILLS}\n" in run.finish(120.0)
    assert_whole(killed, updates=UPDATES)
    assert_same_bits(killed, whole)
