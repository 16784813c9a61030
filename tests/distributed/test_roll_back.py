"""All ranks go back to a checkpoint together, on every engine, and continue as a run that was killed there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_whole_checkpoints import VARIANTS, assert_same_bits
from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_with_bad_windows
from tests.helpers.tiers import long_except
from w2vscale.analysis.report.reading import read_run
from w2vscale.checkpoint.format import committed, read_document
from w2vscale.files import read_metrics

pytestmark = pytest.mark.distributed

BAD = (7, 8)
"""Windows that give a high loss: the trouble begins after update 7 and has lasted for two lines at update 9."""


def settings(variant: str) -> tuple[str, ...]:
    return (
        f"engine={{{VARIANTS[variant]}}}", "batch.max_seconds=4", "batch.micro_batches=2", "model.layers=2",
        "health.action=roll_back", "health.patience=2", "checkpoint.every=3", "checkpoint.keep_last=9",
        "trainer.updates=11",
    )  # fmt: skip


@pytest.mark.parametrize("variant", long_except({"fsdp"}, VARIANTS))
def test_a_roll_back(pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, variant: str) -> None:
    def run(exp: Path) -> list[float]:
        arguments = (str(small_corpus.train), str(exp), settings(variant), BAD)
        assert pool(2).run(train_with_bad_windows, *arguments) == ["", ""]
        assert read_run(exp).roll_backs == [6]
        return [line["loss"] for line in read_metrics(exp / "metrics.jsonl", "train")]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    losses = run(whole)
    assert len(losses) == 11 and max(losses) < 6.0
    states = [read_document(path).state for path in committed(whole / "checkpoints")]
    assert [(state.update, state.skipped_windows) for state in states] == [(3, 0), (6, 3), (9, 3), (11, 3)]
    shutil.copytree(whole, killed, symlinks=True)
    for path in committed(killed / "checkpoints")[2:]:
        shutil.rmtree(path)
    assert run(killed) == losses
    assert_same_bits(killed, whole)


def test_all_ranks_stop_with_the_same_error(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    overrides = (*settings("fsdp"), "health.action=stop")
    errors = pool(2).run(train_with_bad_windows, str(small_corpus.train), str(tmp_path), overrides, BAD)
    assert len(set(errors)) == 1
    assert errors[0].startswith("stopped at update 9 (health.action=stop): trouble since update 7: the loss spikes")
    assert errors[0].endswith(f"continue with --resume {tmp_path / 'checkpoints' / 'update_00000006'}")
