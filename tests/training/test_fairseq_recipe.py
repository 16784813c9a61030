"""The preset `fairseq_base` trains as a plain loop of PyTorch does that follows fairseq's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_MODEL
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import load_config
from w2vscale.data.indexed import MicroBatches
from w2vscale.files import read_metrics
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.base import initial_state
from w2vscale.optim.adamw import parameter_groups
from w2vscale.optim.schedules import learning_rate
from w2vscale.training.run import open_training_set
from w2vscale.training.train import train

UPDATES, WARMUP, PEAK = 20, 8, 2e-3
RUN = (
    *MICRO_MODEL, "data.max_seconds=2", "data.min_seconds=0.5", "data.workers=0", "batch.max_seconds=8",
    "batch.micro_batches=2", "regularization.layerdrop=0.3", "precision.compute=fp32", "logging.every=1",
    f"trainer.updates={UPDATES}", f"schedule.warmup_updates={WARMUP}", f"optim.lr={PEAK}",
)  # fmt: skip


def polynomial_decay(update: int, *, peak: float, warmup: int, updates: int) -> float:
    """fairseq's `step_update(num_updates)` with power 1, which ends at 0."""
    if update <= warmup:
        return peak * update / warmup
    return peak * (updates - update) / (updates - warmup)


@pytest.mark.parametrize("update", [0, 1, 31_999, 32_000, 216_000, 399_999])
def test_the_learning_rate_is_that_of_fairseq(update: int) -> None:
    config = load_config("fairseq_base")
    found = learning_rate(update, optim=config.optim, schedule=config.schedule, updates=config.trainer.updates)
    expected = polynomial_decay(update, peak=5e-4, warmup=32_000, updates=400_000)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("preset", ["fairseq_base", "fairseq_large", "fairseq_large_lv60"])
def test_all_parameters_are_one_group_and_gradients_are_not_clipped(preset: str) -> None:
    config = load_config(preset)
    with torch.device("meta"):
        model = build_objective(config).build_model()
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    (group,) = parameter_groups(shapes, config.optim)
    assert (len(group.names), group.lr_scale, group.weight_decay) == (len(shapes), 1.0, 0.01)
    assert config.optim.max_norm is None


def test_twenty_updates_equal_a_plain_loop(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    config = load_config("fairseq_base", [*RUN, f"data.train={small_corpus.train}"])
    assert train(config, tmp_path) == 0

    objective = build_objective(config)
    dataset = open_training_set(config, objective)
    assert isinstance(dataset, MicroBatches)
    model = objective.build_model().train()
    model.load_state_dict(dict(initial_state(objective, seed=0)))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=False)
    losses, rates, norms = [], [], []
    for update in range(UPDATES):
        batches = [dataset[number] for number in (2 * update, 2 * update + 1)]
        for batch in batches:
            counts = batch.inputs.audio.mask_BT.sum(dim=1)
            assert counts.min() == counts.max() > 0
        masked = sum(batch.masked_frames for batch in batches)
        total = 0.0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # also of the blocks that LayerDrop skips, as in fairseq
        for batch in sorted(batches, key=lambda batch: -max(batch.inputs.audio.samples)):
            step = StepContext(0, update, (batch.number,))
            loss = objective.forward(model, batch.inputs, step=step, training=True).total
            (loss / masked).backward()
            total += float(loss.detach())
        norms.append(float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()))
        rates.append(polynomial_decay(update, peak=PEAK, warmup=WARMUP, updates=UPDATES))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        losses.append(total / masked)

    records = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [record["lr"] for record in records] == pytest.approx(rates, abs=1e-12)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 1.0  # clipping at 1.0 would have changed it
    found = whole(open_checkpoint(tmp_path).model_tensors())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-3, atol=1e-5, msg=name)
