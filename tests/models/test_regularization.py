"""LayerDrop, the scale of the gradient into the feature encoder, and dropout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.families import (
    CPU,
    assert_close,
    batch,
    build,
    family,
    gradients,
)
from w2vscale.config import load_config
from w2vscale.data.micro_batch import gumbel_noise
from w2vscale.objectives.criterion import PretrainingCriterion, active_layers

# ---------------------------------------------------------------- LayerDrop and the gradient scale


@pytest.mark.parametrize("name", ["base", "large_lv60"])
def test_a_dropped_layer_is_the_identity_and_gets_no_gradient(name: str) -> None:
    config = family(name)
    model = build(config).train()
    encoded = []
    calls = [0] * config.layers
    model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    for index, block in enumerate(model.encoder.transformer.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    part = batch(config, 2000)
    sums = model(
        part.inputs,
        noise_MGV=gumbel_noise([part], seed=0, config=config, device=CPU),
        active=[True, False, True],
    )
    (output,) = encoded
    assert calls == [1, 0, 1]
    assert torch.equal(output.hidden[2], output.hidden[1])
    assert not torch.equal(output.hidden[1], output.hidden[0])
    assert not torch.equal(output.hidden[3], output.hidden[2])
    names = {name for name, _ in model.named_parameters()}
    assert names - gradients(model, sums.total).keys() == {name for name in names if ".blocks.1." in name}


def test_dropped_layers_are_a_function_of_seed_and_update() -> None:
    config = load_config("base", ["model.layerdrop=0.2"]).model
    drawn = [active_layers(update, config, seed=3) for update in range(500)]
    assert drawn == [active_layers(update, config, seed=3) for update in range(500)]
    assert drawn[0] is not None and len(drawn[0]) == config.layers
    assert drawn != [active_layers(update, config, seed=4) for update in range(500)]
    assert np.mean(drawn) == pytest.approx(0.8, abs=0.026)  # five standard deviations
    assert active_layers(0, load_config("base", ["model.layerdrop=0"]).model, seed=3) is None


def test_every_layer_runs_in_evaluation() -> None:
    config = family("base", "model.layerdrop=0.99", "model.dropout=0.5", "model.input_dropout=0.5")
    model = build(config).eval()
    criterion = PretrainingCriterion(config, seed=0)
    calls: list[int] = []
    for block in model.encoder.transformer.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    criterion(model, [batch(config, 2000)], device=CPU, training=False)
    assert len(calls) == config.layers


def test_the_gradient_into_the_feature_encoder_is_scaled_and_nothing_else() -> None:
    """That of the feature penalty included; the values stay."""
    found, losses = [], []
    for scale in (1.0, 0.1):
        config = family("base", f"model.feature_grad_mult={scale}", "model.feature_penalty_weight=10")
        model = build(config).train()
        part = batch(config, 2000, 2400)
        sums = PretrainingCriterion(config, seed=4)(model, [part], device=CPU, training=True)
        found.append(gradients(model, sums.total))
        losses.append(sums.total.item())
    assert losses[0] == losses[1]
    whole, scaled = found
    for name, gradient in whole.items():
        factor = 0.1 if name.startswith("encoder.feature_encoder.") else 1.0
        torch.testing.assert_close(scaled[name], factor * gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["base", "large_lv60"])
def test_a_scale_of_zero_freezes_the_feature_encoder(name: str) -> None:
    config = family(name, "model.feature_grad_mult=0", "model.feature_penalty_weight=10")
    model = build(config).train()
    sums = PretrainingCriterion(config, seed=4)(model, [batch(config, 2000, 2400)], device=CPU, training=True)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in model.named_parameters()} - learned == {
        name for name, _ in model.named_parameters() if name.startswith("encoder.feature_encoder.")
    }
    assert gradients(model, sums.total).keys() == learned


# ---------------------------------------------------------------- determinism


DROPOUT = ("model.dropout=0.1", "model.attention_dropout=0.1", "model.input_dropout=0.1", "model.feature_dropout=0.1")


def test_dropout_is_a_function_of_seed_and_number() -> None:
    config = family("base", *DROPOUT, "model.activation_dropout=0.1")
    model = build(config).train()
    contexts: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
    part = batch(config, 2000, 2600, number=7)

    def run(seed: int, number: int, training: bool = True) -> tuple[float, Tensor]:
        torch.rand(3)  # whatever came before does not matter
        chunk = [replace(part, number=number)]
        sums = PretrainingCriterion(config, seed=seed)(model.train(training), chunk, device=CPU, training=training)
        return sums.total.item(), contexts.pop()

    loss, context = run(seed=1, number=7)
    again, same_context = run(seed=1, number=7)
    assert again == loss and torch.equal(same_context, context)
    for seed, number in ((1, 8), (2, 7)):
        other, other_context = run(seed, number)
        assert other != loss
        assert not torch.allclose(other_context, context)  # dropout: Gumbel noise does not reach the context
    plain, _ = run(seed=1, number=7, training=False)
    assert plain == run(seed=2, number=8, training=False)[0]


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout", "activation_dropout", "input_dropout"])
def test_every_dropout_of_the_context_has_an_effect_in_training_alone(setting: str) -> None:
    plain, config = family("base"), family("base", f"model.{setting}=0.3")
    part = batch(config, 2000)
    contexts: list[Tensor] = []
    for settings in (plain, config):
        model = build(settings)
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD.detach()))
        for training in (True, False):
            PretrainingCriterion(settings, seed=1)(model.train(training), [part], device=CPU, training=training)
    without, without_in_evaluation, dropped, in_evaluation = contexts
    assert_close(without, without_in_evaluation)
    assert torch.equal(in_evaluation, without_in_evaluation)
    assert not torch.allclose(dropped, without, rtol=1e-2, atol=1e-2)


def test_feature_dropout_reaches_the_quantizer_alone() -> None:
    plain, config = family("base"), family("base", "model.feature_dropout=0.5")
    part = batch(config, 2000)
    contexts, logits = [], []
    for settings in (plain, config):
        model = build(settings).train()
        model.encoder.register_forward_hook(lambda module, args, output: contexts.append(output.context_BTD))
        model.quantizer.register_forward_hook(lambda module, args, output: logits.append(output.logits_MGV))
        PretrainingCriterion(settings, seed=1)(model, [part], device=CPU, training=True)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2)
