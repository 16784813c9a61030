"""The engine's contract, with one process: gradients over a global denominator, clipping, skipping, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from w2vscale.objectives.criterion import PretrainingCriterion, active_layers

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config, load_config
from w2vscale.data.loading import MicroBatches, make_plan
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import Ranks
from w2vscale.engine.ddp import DDPEngine
from w2vscale.models.initialisation import initial_parameters
from w2vscale.training.run import empty_model

CPU = torch.device("cpu")


def settings(corpus: SmallCorpus, *overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", *overrides])


def engine(config: Config, *, seed: int = 0) -> DDPEngine:
    running = DDPEngine(empty_model(config), PretrainingCriterion(config.model, seed=0), config, CPU)
    running.import_parameters(initial_parameters(empty_model(config), lambda index: 1000 * seed + index))
    return running


def window(config: Config, count: int = 2) -> list[MicroBatch]:
    corpus = Corpus(config.data.train)
    dataset = MicroBatches(corpus, make_plan(corpus, config, seed=0), config, seed=0)
    return [dataset[(0, number)] for number in range(count)]


def snapshot(running: DDPEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in running.export_state().items()}


def test_gradients_are_those_of_the_sum_over_the_denominator(small_corpus: SmallCorpus) -> None:
    config = settings(small_corpus)
    running, batches = engine(config), window(config)
    running.run_window(batches, torch.tensor(100.0))
    accumulated = {name: p.grad.clone() for name, p in running.model.named_parameters() if p.grad is not None}
    running.optimizer.zero_grad()
    for batch in batches:
        sums = running.criterion(running.model, [batch], device=CPU, training=True)
        (sums.total / 100.0).backward()
    for name, parameter in running.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(accumulated[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("denominator", [0.0, float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(small_corpus: SmallCorpus, denominator: float) -> None:
    config = settings(small_corpus)
    running, batches = engine(config), window(config)
    before = snapshot(running)
    running.run_window(batches, torch.tensor(denominator))
    result = running.step(lr=1e-3, max_norm=1.0)
    assert result.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in running.export_state().items())

    running.run_window(batches, torch.tensor(1000.0))
    assert not running.step(lr=1e-3, max_norm=1.0).skipped
    assert not torch.equal(
        running.export_state()["model.encoder.mask_embedding"], before["model.encoder.mask_embedding"]
    )


def test_the_norm_is_of_before_clipping_and_clipping_bounds_the_step(small_corpus: SmallCorpus) -> None:
    config = settings(small_corpus, "optim.betas=[0.0, 0.0]", "optim.eps=1e6", "optim.weight_decay=0")
    batches = window(config)
    steps = []
    for max_norm in (None, 0.5):
        running = engine(config)
        before = snapshot(running)
        running.run_window(batches, torch.tensor(10.0))
        # With such an eps Adam's step is the gradient times lr / eps.
        result = running.step(lr=1e6, max_norm=max_norm)
        moved = [running.export_state()[name] - before[name] for name in before if name.startswith("model.")]
        steps.append((result.grad_norm, float(torch.cat([change.flatten() for change in moved]).norm())))
    (norm, free), (same_norm, clipped) = steps
    assert same_norm == pytest.approx(norm)
    assert norm > 1.0
    assert free == pytest.approx(norm, rel=1e-2)
    assert clipped == pytest.approx(0.5, rel=1e-2)


def test_layers_that_were_skipped_still_have_their_moments_decayed(small_corpus: SmallCorpus) -> None:
    """As where gradients are sharded: a missing gradient is a zero."""
    config = settings(small_corpus, "regularization.layerdrop=0.5")
    skipping = next(update for update in range(100) if not (active_layers(update, config.model, seed=0) or [True])[0])
    running = engine(config)
    batches = [MicroBatch(skipping, batch.number, batch.inputs, batch.audio_samples) for batch in window(config)]
    for name, tensor in running.export_state().items():
        if name.endswith("exp_avg"):
            tensor.fill_(1.0)
    running.run_window(batches, torch.tensor(1000.0))
    running.step(lr=1e-3, max_norm=None)
    moments = running.export_state()["optim.encoder.transformer.blocks.0.attention.out.weight.exp_avg"]
    torch.testing.assert_close(moments, torch.full_like(moments, config.optim.betas[0]))


def test_state_exists_from_the_start_and_survives_a_checkpoint(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    config = settings(small_corpus)
    first, second = engine(config, seed=1), engine(config, seed=2)
    names = set(first.export_state())
    parameters = [name for name, _ in first.model.named_parameters()]
    assert names == {f"model.{name}" for name in parameters} | {
        f"optim.{name}.{key}" for name in parameters for key in ("exp_avg", "exp_avg_sq", "step")
    }
    first.run_window(window(config), torch.tensor(1000.0))
    first.step(lr=1e-3, max_norm=1.0)
    store = CheckpointStore(tmp_path, Ranks(), expected=expected_of(config))
    store.save(first.export_state(), TrainState(update=1), dump_config(config))
    found = store.find(print)
    assert found is not None
    second.import_state(found)
    for name, tensor in second.export_state().items():
        assert torch.equal(tensor, first.export_state()[name]), name
    for (_, whole), (_, parameter) in zip(
        second.named_full_parameters(torch.bfloat16), first.model.named_parameters(), strict=True
    ):
        assert torch.equal(whole, parameter.to(torch.bfloat16))


def test_evaluation_leaves_no_trace(small_corpus: SmallCorpus) -> None:
    config = settings(small_corpus)
    running, (batch, _) = engine(config), window(config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sums = running.evaluate(batch)
    again = running.evaluate(batch)
    assert torch.equal(sums.total, again.total)
    assert not sums.total.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
