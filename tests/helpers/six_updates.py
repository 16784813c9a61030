"""Runs of six updates of a micro model on any engine, and how they compare."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from w2vscale.checkpoint.reader import open_checkpoint

ODD_MODEL = (
    "model.conv_layers=[[17,10,5],[17,3,2],[17,3,2],[17,3,2],[17,3,2],[17,2,2],[17,2,2]]",
    "model.conv_norm_groups=17",
    "model.ffn_dim=65",
    "objective.codebook_entries=15",
    "objective.codevector_dim=14",
    "objective.projection_dim=13",
)
"""Sizes that two and three processes do not divide; LayerDrop, dropout and clipping are on (tests/helpers/micro.py)."""

SIX = (
    *ODD_MODEL,
    "data.max_seconds=1",
    "batch.max_seconds=2.5",
    "trainer.updates=6",
    "checkpoint.every=3",
    "checkpoint.keep_last=3",
    "optim.max_norm=2.0",
)


def figures(exp: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every update."""
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records if record["split"] == "train"]


def state(exp: Path) -> dict[str, torch.Tensor]:
    """Parameters and moments of a run's newest checkpoint."""
    checkpoint = open_checkpoint(exp)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def first_three(whole: Path, exp: Path) -> Path:
    """Copy a run of six updates to `exp`, without its last checkpoint, so that it can be continued there."""
    shutil.copytree(whole, exp, symlinks=True)
    shutil.rmtree(exp / "checkpoints" / "update_00000006")
    return exp


def assert_same(found: Path, expected: Path, *, tolerance: float = 1e-5) -> None:
    """Equal losses, gradient norms, parameters and moments."""
    pairs = list(zip(figures(found), figures(expected), strict=True))
    assert len(pairs) == 6
    for (loss, norm), (expected_loss, expected_norm) in pairs:
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = float((ours[name] - tensor).norm())
        # Attention's key biases have gradients of rounding noise: they move by the noise's size.
        assert difference <= tolerance * float(tensor.norm()) + 1e-9 * math.sqrt(tensor.numel()), name


def assert_same_bits(found: Path, expected: Path) -> None:
    """Equal parameters and moments, bit for bit."""
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def assert_similar(found: Path, expected: Path) -> None:
    """What rounding to bf16 at other places leaves: a few percent in losses, norms, parameters and moments."""
    for (loss, norm), (expected_loss, expected_norm) in zip(figures(found), figures(expected), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-2)
        assert norm == pytest.approx(expected_norm, rel=3e-2)
    ours, theirs = state(found), state(expected)
    for kind in ("model.", ".exp_avg", ".exp_avg_sq"):
        names = [name for name in theirs if (name.startswith(kind) if kind[0] != "." else name.endswith(kind))]
        whole, expected_whole = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (ours, theirs))
        assert float((whole - expected_whole).norm()) <= 2e-2 * float(expected_whole.norm()), kind
