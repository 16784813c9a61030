"""Initial values are a function of seed and architecture, and are drawn module by module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import Config, load_config
from w2vscale.models.initialisation import empty_parameters, initial_values
from w2vscale.objectives import build_objective


def micro(*overrides: str) -> Config:
    return load_config("base", [*MICRO_MODEL, *overrides])


def values(config: Config, *, seed: int = 0) -> dict[str, torch.Tensor]:
    with empty_parameters():
        model = build_objective(config).build_model()
    found = {name: tensor.clone() for name, tensor in initial_values(model, lambda index: 1000 * seed + index)}
    assert all(parameter.is_meta for parameter in model.parameters()), "the memory of each module is freed"
    return found


def test_every_parameter_is_there_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = values(micro())
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in build_objective(micro()).build_model().state_dict().items()
    }
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_the_seed_decides() -> None:
    first, again, other = values(micro()), values(micro()), values(micro(), seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.mask_embedding"], other["encoder.mask_embedding"])
    blocks = [first[f"encoder.transformer.blocks.{index}.attention.out.weight"] for index in range(2)]
    assert not torch.equal(*blocks)


def test_distributions_are_those_of_fairseq() -> None:
    """Where fairseq states none, the distribution is the default of PyTorch."""
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
    bound = 1 / math.sqrt(512)  # default of PyTorch for nn.Linear with 512 inputs
    assert bound * 0.99 < float(found["encoder.feature_projection.weight"].abs().max()) <= bound
    assert found["encoder.feature_norm.weight"].eq(1).all() and found["encoder.feature_norm.bias"].eq(0).all()


def test_convolution_biases_have_the_default_of_pytorch_and_the_output_layer_of_ctc_is_xavier() -> None:
    """In fairseq: `nn.Conv1d` (only its weights are drawn again), and `xavier_uniform_` with biases of 0."""
    settings = ["model.layers=1", "objective.name=ctc", "objective.vocabulary=letters", "objective.head_init=xavier"]
    found = values(load_config("large_lv60", settings))
    for layer, bound in ((0, 1 / math.sqrt(10)), (1, 1 / math.sqrt(512 * 3))):
        bias = found[f"encoder.feature_encoder.layers.{layer}.bias"]
        assert bound * 0.95 < float(bias.abs().max()) <= bound and abs(float(bias.mean())) < bound / 8
    assert not found["encoder.transformer.positional.bias"].any()
    bound = math.sqrt(6 / (1024 + 32))
    assert bound * 0.99 < float(found["head.weight"].abs().max()) <= bound and not found["head.bias"].any()
    normal = values(load_config("base", ["model.layers=1", *settings[1:3]]))["head.weight"]  # as in Transformers
    assert float(normal.std()) == pytest.approx(0.02, rel=0.05)


class WithBuffers(nn.Module):
    """A drawn buffer, a constant one, one that is not saved, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("drawn", torch.zeros(4))
        self.register_buffer("constant", torch.arange(5))
        self.register_buffer("not_saved", torch.ones(2), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.frozen)
        nn.init.normal_(self.drawn)


def test_persistent_buffers_have_initial_values_too() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        with empty_parameters():
            model = nn.Sequential(WithBuffers(), nn.BatchNorm1d(2))
        assert model[0].frozen.is_meta and not model[0].frozen.requires_grad
        return {name: tensor.clone() for name, tensor in initial_values(model, lambda index: seed + index)}

    found, again, other = draw(1), draw(1), draw(2)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    names = {"0.frozen", "0.drawn", "0.constant", "1.weight", "1.bias", *(f"1.{name}" for name in statistics)}
    assert found.keys() == names
    assert torch.equal(found["0.frozen"], torch.ones(3)) and torch.equal(found["0.constant"], torch.arange(5))
    assert torch.equal(found["1.running_var"], torch.ones(2)) and not found["1.running_mean"].any()
    assert found["0.drawn"].all() and torch.equal(found["0.drawn"], again["0.drawn"])
    assert not torch.equal(found["0.drawn"], other["0.drawn"])


def test_parameters_that_nothing_initialises_are_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with empty_parameters():
        model = nn.Sequential(Scale())
    with pytest.raises(TypeError, match="0: Scale has parameters and no reset_parameters"):
        list(initial_values(model, lambda index: index))
