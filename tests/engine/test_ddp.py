"""The engine's contract, with one process: gradients over a global denominator, clipping, skipping, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.engines import Setup, set_up
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config, load_config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import Ranks
from w2vscale.engine.ddp import DDPEngine
from w2vscale.objectives import StepContext


def settings(corpus: SmallCorpus, *overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", *overrides])


def running(config: Config) -> tuple[Setup, DDPEngine]:
    setup = set_up(config)
    assert isinstance(setup.engine, DDPEngine)
    return setup, setup.engine


def window(setup: Setup, count: int = 2) -> list[MicroBatch]:
    (found,) = setup.training_set.windows(range(1), micro_batches=count, rank=0, world_size=1)
    return found


def snapshot(engine: DDPEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.export_state().items()}


def test_gradients_are_those_of_the_sum_over_the_denominator(small_corpus: SmallCorpus) -> None:
    setup, engine = running(settings(small_corpus))
    batches = window(setup)
    setup.window(batches, 100.0)
    accumulated = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    engine.optimizer.zero_grad()
    for batch in batches:
        step = StepContext(setup.config.trainer.seed, 0, (batch.number,))
        sums = setup.objective.forward(engine.model, batch.inputs, step=step, training=True)
        (sums.total / 100.0).backward()
    for name, parameter in engine.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(accumulated[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("denominator", [0.0, float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    small_corpus: SmallCorpus, denominator: float, max_norm: float | None
) -> None:
    setup, engine = running(settings(small_corpus))
    batches = window(setup)
    setup.window(batches, 1000.0)
    engine.step(lr=1e-3, max_norm=1.0)  # moments and step counts are no longer zero
    before = snapshot(engine)
    setup.window(batches, denominator)
    assert not engine.step(lr=1e-3, max_norm=max_norm).isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.export_state().items())

    setup.window(batches, 1000.0)
    assert engine.step(lr=1e-3, max_norm=max_norm).isfinite()
    assert not torch.equal(
        engine.export_state()["model.encoder.mask_embedding"], before["model.encoder.mask_embedding"]
    )


def test_the_norm_is_of_before_clipping_and_clipping_bounds_the_step(small_corpus: SmallCorpus) -> None:
    config = settings(small_corpus, "optim.betas=[0.0, 0.0]", "optim.eps=1e6", "optim.weight_decay=0")
    steps = []
    for max_norm in (None, 0.5):
        setup, engine = running(config)
        batches = window(setup)
        before = snapshot(engine)
        setup.window(batches, 10.0)
        # With such an eps Adam's step is the gradient times lr / eps.
        norm = engine.step(lr=1e6, max_norm=max_norm)
        moved = [engine.export_state()[name] - before[name] for name in before if name.startswith("model.")]
        steps.append((float(norm), float(torch.cat([change.flatten() for change in moved]).norm())))
    (norm, free), (same_norm, clipped) = steps
    assert same_norm == pytest.approx(norm)
    assert norm > 1.0
    assert free == pytest.approx(norm, rel=1e-2)
    assert clipped == pytest.approx(0.5, rel=1e-2)


def test_layers_that_were_skipped_still_have_their_moments_decayed(small_corpus: SmallCorpus) -> None:
    """As where gradients are sharded: a missing gradient is a zero."""
    setup, engine = running(settings(small_corpus, "regularization.layerdrop=0.5"))
    skipping = next(update for update in range(100) if not (StepContext(0, update).active_layers(3, 0.5) or [True])[0])
    for name, tensor in engine.export_state().items():
        if name.endswith("exp_avg"):
            tensor.fill_(1.0)
    setup.window(window(setup), 1000.0, update=skipping)
    engine.step(lr=1e-3, max_norm=None)
    moments = engine.export_state()["optim.encoder.transformer.blocks.0.attention.out.weight.exp_avg"]
    torch.testing.assert_close(moments, torch.full_like(moments, setup.config.optim.betas[0]))


def test_state_exists_from_the_start_and_survives_a_checkpoint(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    config = settings(small_corpus)
    setup, first = running(config)
    _, second = running(settings(small_corpus, "trainer.seed=2"))
    parameters = [name for name, _ in first.model.named_parameters()]
    assert set(first.export_state()) == {f"model.{name}" for name in parameters} | {
        f"optim.{name}.{key}" for name in parameters for key in ("exp_avg", "exp_avg_sq", "step")
    }
    setup.window(window(setup), 1000.0)
    first.step(lr=1e-3, max_norm=1.0)
    store = CheckpointStore(tmp_path, Ranks(), expected=expected_of(config))
    store.save(first.export_state(), TrainState(update=1), dump_config(config))
    found = store.find(print)
    assert found is not None
    second.import_state(found)
    expected = first.export_state()
    for name, tensor in second.export_state().items():
        assert torch.equal(tensor, expected[name]), name


def test_values_replace_the_model_and_leave_the_optimizer(small_corpus: SmallCorpus) -> None:
    setup, engine = running(settings(small_corpus))
    before = snapshot(engine)
    setup.window(window(setup), 1000.0)
    engine.step(lr=1e-3, max_norm=1.0)
    stepped = snapshot(engine)
    engine.import_values(setup.initial_values())
    for name, tensor in engine.export_state().items():
        assert torch.equal(tensor, (before if name.startswith("model.") else stepped)[name]), name


def test_evaluation_leaves_no_trace(small_corpus: SmallCorpus) -> None:
    setup, _ = running(settings(small_corpus))
    batch, _ = window(setup)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sums = setup.evaluate(batch)
    again = setup.evaluate(batch)
    assert torch.equal(sums.total, again.total)
    assert not sums.total.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
