"""The loss of an untrained model, and of a model whose codebook has collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.families import batch, build, family, sums_of
from w2vscale.objectives.quantizer import diversity_loss, perplexity
from w2vscale.objectives.similarity import contrastive_logits, contrastive_loss


def equal_similarities(ids_M: Tensor, negatives_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and correct frames of a model that cannot tell frames apart."""
    frames = ids_M.numel()
    same_MD = torch.ones(frames, 8)
    logits_MK = contrastive_logits(
        same_MD,
        same_MD,
        ids_M,
        utterance_M=torch.zeros(frames, dtype=torch.long),
        slot_M=torch.arange(frames),
        negatives_MK=negatives_MK,
        utterances=1,
        slots=frames,
        temperature=0.1,
    )
    return contrastive_loss(logits_MK)


def test_chance_is_log_101_nats() -> None:
    negatives_MK = (torch.arange(100) + 1 + torch.arange(150).unsqueeze(1)) % 150
    loss, _ = equal_similarities(torch.arange(150), negatives_MK)
    per_frame = loss.item() / 150
    assert per_frame == pytest.approx(math.log(101), rel=1e-6)
    assert per_frame == pytest.approx(4.615, abs=1e-3)
    assert per_frame / math.log(2) == pytest.approx(6.658, abs=1e-3)


def test_a_collapsed_codebook_has_no_negatives_no_loss_and_full_accuracy() -> None:
    negatives_MK = (torch.arange(100) + 1 + torch.arange(150).unsqueeze(1)) % 150
    loss, correct = equal_similarities(torch.zeros(150, dtype=torch.long), negatives_MK)
    assert loss.item() == 0.0
    assert int(correct) == 150


def test_the_diversity_loss_runs_from_0_to_638_of_640() -> None:
    uniform_GV = torch.full((2, 320), 1 / 320)
    one_code_GV = torch.nn.functional.one_hot(torch.tensor([3, 300]), 320).float()
    # fairseq's 1e-7 inside the logarithm makes 320 equal entries count as 320 (1 - 320e-7).
    half_GV = torch.cat([torch.full((2, 160), 1 / 160), torch.zeros(2, 160)], dim=1)
    uniform, one_code, half = diversity_loss(torch.stack([uniform_GV, one_code_GV, half_GV])).tolist()
    assert uniform == pytest.approx(0.0, abs=4e-5)
    assert one_code == pytest.approx(638 / 640, rel=1e-6)
    assert half == pytest.approx(0.5, abs=4e-5)
    assert perplexity(half_GV).tolist() == pytest.approx([160, 160], rel=4e-5)


def test_an_untrained_model_is_near_chance() -> None:
    objective = family("base", "objective.negatives=100", "objective.codebook_entries=320")
    sums = sums_of(objective, build(objective).eval(), batch(objective, 12_000, 12_000))
    assert float(sums.contrastive / sums.masked) == pytest.approx(math.log(101), rel=0.15)
    assert float(sums.correct / sums.masked) < 0.1
