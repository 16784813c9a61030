"""LayerDrop, the scale of the gradient into the feature encoder, and dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.families import assert_close, batch, build, family, gradients, sums_of
from w2vscale.objectives import StepContext

# ---------------------------------------------------------------- LayerDrop and the gradient scale


@pytest.mark.parametrize("name", ["base", "large_lv60"])
def test_a_dropped_layer_is_the_identity_and_gets_no_gradient(name: str) -> None:
    objective = family(name)
    model = build(objective).train()
    encoded = []
    calls = [0] * objective.model.layers
    model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    for index, block in enumerate(model.encoder.transformer.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    inputs = batch(objective, 2000)
    noise_MGV = objective._gumbel_noise(inputs, StepContext(seed=0, update=0, numbers=(0,)))
    sums = model(inputs, noise_MGV=noise_MGV, active=[True, False, True])
    (output,) = encoded
    assert calls == [1, 0, 1]
    assert torch.equal(output.hidden[2], output.hidden[1])
    assert not torch.equal(output.hidden[1], output.hidden[0])
    assert not torch.equal(output.hidden[3], output.hidden[2])
    names = {name for name, _ in model.named_parameters()}
    assert names - gradients(model, sums.total).keys() == {name for name in names if ".blocks.1." in name}


def test_dropped_layers_are_a_function_of_seed_and_update() -> None:
    def draw(seed: int, numbers: tuple[int, ...]) -> list[list[bool] | None]:
        return [StepContext(seed, update, numbers).active_layers(12, 0.2) for update in range(500)]

    drawn = draw(3, (0,))
    assert drawn == draw(3, (7, 8)), "all forwards of an update drop the same layers"
    assert drawn[0] is not None and len(drawn[0]) == 12
    assert drawn != draw(4, (0,))
    assert np.mean(drawn) == pytest.approx(0.8, abs=0.026)  # five standard deviations
    assert StepContext(3, 0).active_layers(12, 0.0) is None
    assert StepContext(3, 0, worst_case=True).active_layers(12, 0.2) is None


def test_layers_are_dropped_in_training() -> None:
    objective = family("base", "regularization.layerdrop=0.99")
    model = build(objective).train()
    calls: list[int] = []
    for block in model.encoder.transformer.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    sums_of(objective, model, batch(objective, 2000))
    assert len(calls) < objective.model.layers


def test_every_layer_runs_in_evaluation() -> None:
    settings = ("regularization.layerdrop=0.99", "regularization.dropout=0.5", "regularization.input_dropout=0.5")
    objective = family("base", *settings)
    model = build(objective).eval()
    calls: list[int] = []
    for block in model.encoder.transformer.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    sums_of(objective, model, batch(objective, 2000))
    assert len(calls) == objective.model.layers


def test_the_gradient_into_the_feature_encoder_is_scaled_and_nothing_else() -> None:
    """The gradient of the feature penalty is scaled too; the loss does not change."""
    found, losses = [], []
    for scale in (1.0, 0.1):
        settings = (f"regularization.feature_grad_mult={scale}", "objective.feature_penalty_weight=10")
        objective = family("base", *settings)
        model = build(objective).train()
        sums = sums_of(objective, model, batch(objective, 2000, 2400))
        found.append(gradients(model, sums.total))
        losses.append(sums.total.item())
    assert losses[0] == losses[1]
    whole, scaled = found
    for name, gradient in whole.items():
        factor = 0.1 if name.startswith("encoder.feature_encoder.") else 1.0
        torch.testing.assert_close(scaled[name], factor * gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["base", "large_lv60"])
def test_a_scale_of_zero_freezes_the_feature_encoder(name: str) -> None:
    objective = family(name, "regularization.feature_grad_mult=0", "objective.feature_penalty_weight=10")
    model = build(objective).train()
    sums = sums_of(objective, model, batch(objective, 2000, 2400))
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in model.named_parameters()} - learned == {
        name for name, _ in model.named_parameters() if name.startswith("encoder.feature_encoder.")
    }
    assert gradients(model, sums.total).keys() == learned


# ---------------------------------------------------------------- determinism


DROPOUT = (
    "regularization.dropout=0.1",
    "regularization.attention_dropout=0.1",
    "regularization.activation_dropout=0.1",
    "regularization.input_dropout=0.1",
    "objective.feature_dropout=0.1",
)


def test_dropout_is_a_function_of_seed_and_number() -> None:
    objective = family("base", *DROPOUT)
    model = build(objective)
    contexts: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
    inputs = batch(objective, 2000, 2600, number=7)

    def run(seed: int, number: int, training: bool = True) -> tuple[float, Tensor]:
        torch.rand(3)  # earlier draws do not matter
        sums = sums_of(objective, model.train(training), inputs, numbers=(number,), seed=seed)
        return sums.total.item(), contexts.pop()

    loss, context = run(seed=1, number=7)
    again, same_context = run(seed=1, number=7)
    assert again == loss and torch.equal(same_context, context)
    for seed, number in ((1, 8), (2, 7)):
        other, other_context = run(seed, number)
        assert other != loss
        assert not torch.allclose(other_context, context)  # dropout, as Gumbel noise does not reach the context
    plain, _ = run(seed=1, number=7, training=False)
    assert plain == run(seed=2, number=8, training=False)[0]


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout", "activation_dropout", "input_dropout"])
def test_every_dropout_of_the_context_has_an_effect_in_training_alone(setting: str) -> None:
    objectives = family("base"), family("base", f"regularization.{setting}=0.3")
    inputs = batch(objectives[0], 2000)
    contexts: list[Tensor] = []
    for objective in objectives:
        model = build(objective)
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
        for training in (True, False):
            sums_of(objective, model.train(training), inputs)
    without, without_in_evaluation, dropped, in_evaluation = contexts
    assert_close(without, without_in_evaluation)
    assert torch.equal(in_evaluation, without_in_evaluation)
    assert not torch.allclose(dropped, without, rtol=1e-2, atol=1e-2)


def test_feature_dropout_reaches_the_quantizer_alone() -> None:
    objectives = family("base"), family("base", "objective.feature_dropout=0.5")
    inputs = batch(objectives[0], 2000)
    contexts, logits = [], []
    for objective in objectives:
        model = build(objective).train()
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD))
        model.quantizer.register_forward_hook(lambda module, args, output: logits.append(output.logits_MGV))
        sums_of(objective, model, inputs)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2)
