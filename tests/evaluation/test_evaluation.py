"""Evaluation of a checkpoint agrees with validation during the run; metrics agree with their definitions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.files import read_metrics
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import ContrastiveSums
from w2vscale.training.train import train


def test_evaluating_a_checkpoint_repeats_the_validation_of_its_run(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    config = load_config(
        "base",
        [*MICRO_RUN, f"data.train={small_corpus.train}", f"data.validation={small_corpus.validation}",
         "trainer.updates=6", "logging.every=3", "optim.ema_decay=0.5"],
    )  # fmt: skip
    train(config, tmp_path)
    (validated,) = read_metrics(tmp_path / "metrics.jsonl", "validation")
    found = evaluate_checkpoint(tmp_path, [small_corpus.validation])
    assert found is not None
    assert found.update == 6
    for key in ("loss", "contrastive", "accuracy", "code_perplexity_0", "diversity"):
        assert found.metrics[key] == pytest.approx(validated[key], rel=1e-6), key
    assert all(1 <= found.metrics[f"used_entries_{codebook}"] <= 16 for codebook in (0, 1))
    assert found.table["contrastive accuracy"] == f"{found.metrics['accuracy']:.4f}"
    assert found.table["codebook 1"].startswith(f"{found.metrics['used_entries_1']:.0f} of 16 entries used")

    # Two ranks that hold half of the model each.
    command = [sys.executable, "-m", "w2vscale", "evaluate", tmp_path, "--nproc-per-node", "2"]
    command += ["--cuts", small_corpus.validation, "--output", tmp_path / "sharded.json"]
    subprocess.run(command, check=True, timeout=120)
    sharded = json.loads((tmp_path / "sharded.json").read_text())
    for key in ("utterances", "masked_frames", "loss", "contrastive", "accuracy", "code_perplexity_0", "diversity"):
        assert sharded[key] == pytest.approx(found.metrics[key], rel=1e-5), key

    other = evaluate_checkpoint(tmp_path, [small_corpus.validation], ["batch.max_seconds=4"])
    assert other is not None
    assert other.metrics["masked_frames"] > 0

    with pytest.raises(UserError, match="no such manifest"):
        evaluate_checkpoint(tmp_path, [tmp_path / "absent.jsonl"])
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate_checkpoint(tmp_path / "absent", [small_corpus.validation])
    with pytest.raises(UserError, match=r"^override: objective\.negative: unknown setting; did you mean objective\."):
        evaluate_checkpoint(tmp_path, [small_corpus.validation], ["objective.negative=3"])


def test_metrics_are_sums_over_counts() -> None:
    counts = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    sums = ContrastiveSums(
        total=torch.tensor(40.0),
        contrastive=torch.tensor(24.0),
        diversity=torch.tensor(4.0),
        feature_penalty=torch.tensor(1.0),
        correct=torch.tensor(2.0),
        masked=torch.tensor(8.0),
        code_counts_GV=counts,
        probability_sums_GV=torch.full((2, 4), 2.0),
    )
    values = build_objective(load_config("base")).metrics(sums)
    assert values["loss"] == 5.0
    assert values["contrastive_bits"] == pytest.approx(3.0 / math.log(2))
    assert values["accuracy"] == 0.25
    assert values["code_perplexity_0"] == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5
    )
    assert values["code_perplexity_1"] == pytest.approx(4.0, rel=1e-5)
    assert values["probability_perplexity_0"] == pytest.approx(4.0, rel=1e-5)
