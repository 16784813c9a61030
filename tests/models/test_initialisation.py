"""Initial values: a function of the seed and the architecture, drawn without the model ever being whole."""

from __future__ import annotations

import math

import torch

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import Config, load_config
from w2vscale.models.initialisation import initial_parameters
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining


def micro(*overrides: str) -> Config:
    return load_config("base", [*MICRO_MODEL, *overrides])


def values(config: Config, *, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Wav2Vec2ForPretraining(config.model)
    found = {name: tensor.clone() for name, tensor in initial_parameters(model, lambda index: 1000 * seed + index)}
    assert all(parameter.is_meta for parameter in model.parameters()), "memory is given back module by module"
    return found


def test_every_parameter_is_there_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = values(micro())
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: parameter.shape for name, parameter in Wav2Vec2ForPretraining(micro().model).named_parameters()
    }
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_the_seed_decides() -> None:
    first, again, other = values(micro()), values(micro()), values(micro(), seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.mask_embedding"], other["encoder.mask_embedding"])
    blocks = [first[f"encoder.transformer.blocks.{index}.attention.out.weight"] for index in range(2)]
    assert not torch.equal(*blocks)


def test_distributions_are_the_reference_s() -> None:
    """Those of fairseq's wav2vec 2.0, and PyTorch's where it states none."""
    found = values(load_config("base", ["model.layers=1"]))
    block = "encoder.transformer.blocks.0"
    for name in (f"{block}.attention.qkv.weight", f"{block}.feed_forward.output.weight"):
        assert abs(float(found[name].std()) - 0.02) < 2e-4
    assert not found[f"{block}.attention.out.bias"].any()
    direction = found["encoder.transformer.positional.direction"]
    assert abs(float(direction.std()) / math.sqrt(4 / (128 * 768)) - 1) < 0.01
    torch.testing.assert_close(
        found["encoder.transformer.positional.magnitude"], direction.norm(dim=(0, 1), keepdim=True)
    )
    assert abs(float(found["quantizer.projection.weight"].std()) - 1) < 0.01
    for name in ("quantizer.codevectors", "encoder.mask_embedding"):
        assert 0 <= float(found[name].min()) < 0.05 and 0.95 < float(found[name].max()) <= 1
    kernel = found["encoder.feature_encoder.layers.1.weight"]  # Kaiming: variance 2 / fan-in
    assert abs(float(kernel.std()) / math.sqrt(2 / (512 * 3)) - 1) < 0.01
    bound = 1 / math.sqrt(512)  # PyTorch's default for a Linear of 512 inputs
    assert bound * 0.99 < float(found["encoder.feature_projection.weight"].abs().max()) <= bound
    assert found["encoder.feature_norm.weight"].eq(1).all() and found["encoder.feature_norm.bias"].eq(0).all()
