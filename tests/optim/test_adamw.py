"""Parameter groups, and the fused optimizer against the formula of AdamW in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from w2vscale.config import OptimConfig, load_config
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.optim.adamw import (
    allocate_state,
    clip_and_step,
    make_adamw,
    parameter_groups,
    set_learning_rate,
    state_of,
)

SHAPES = [
    ("encoder.layer.weight", torch.Size([4, 3])),
    ("encoder.layer.bias", torch.Size([4])),
    ("encoder.norm.weight", torch.Size([4])),
    ("conv.weight", torch.Size([8, 1, 10])),
    ("conv.gain", torch.Size([1, 1, 128])),
    ("mask", torch.Size([768])),
    ("scale", torch.Size([])),
]


def config_with(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate(changes)


def settings_of(config: OptimConfig) -> dict[str, tuple[float, float]]:
    """name → (lr_scale, weight_decay), with each name in exactly one group."""
    groups = parameter_groups(SHAPES, config)
    found = {name: (group.lr_scale, group.weight_decay) for group in groups for name in group.names}
    assert sum(len(group.names) for group in groups) == len(found) == len(SHAPES)
    return found


class TestGroups:
    def test_only_matrices_decay(self) -> None:
        found = settings_of(config_with(weight_decay=0.05))
        decayed = {name for name, (_, decay) in found.items() if decay}
        assert decayed == {"encoder.layer.weight", "conv.weight"}
        assert {decay for _, decay in found.values()} == {0.0, 0.05}

    def test_no_bias_norm_gain_or_mask_embedding_of_the_model_decays(self) -> None:
        config = load_config("tiny", ["model.conv_bias=true", "model.conv_norm=layer"])
        with torch.device("meta"):
            model = build_objective(config).build_model()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        groups = parameter_groups(list(shapes.items()), config.optim)
        decayed = {name for group in groups if group.weight_decay for name in group.names}
        assert decayed == {name for name, shape in shapes.items() if sum(size > 1 for size in shape) > 1}
        assert not any(name.endswith("bias") or "norm" in name for name in decayed)
        assert decayed and len(decayed) < len(shapes)

    def test_a_pattern_sets_scale_and_decay_of_parameters_whose_name_it_finds(self) -> None:
        found = settings_of(config_with(groups=[{"pattern": "layer", "lr_scale": 0.5, "weight_decay": 0.2}]))
        assert found["encoder.layer.weight"] == found["encoder.layer.bias"] == (0.5, 0.2)
        assert found["encoder.norm.weight"] == (1.0, 0.0)

    def test_a_pattern_without_its_own_decay_leaves_vectors_without_any(self) -> None:
        found = settings_of(config_with(groups=[{"pattern": "layer", "lr_scale": 0.5}]))
        assert (found["encoder.layer.weight"], found["encoder.layer.bias"]) == ((0.5, 0.01), (0.5, 0.0))

    def test_vectors_decay_too_if_asked(self) -> None:
        (group,) = parameter_groups(SHAPES, config_with(weight_decay=0.3, decay_vectors=True))
        assert group == ([name for name, _ in SHAPES], 1.0, 0.3)
        found = settings_of(config_with(decay_vectors=True, groups=[{"pattern": "layer", "weight_decay": 0.2}]))
        assert found["encoder.layer.bias"] == (1.0, 0.2) and found["encoder.norm.weight"] == (1.0, 0.01)

    def test_a_pattern_for_all_parameters_makes_one_group(self) -> None:
        (group,) = parameter_groups(SHAPES, config_with(groups=[{"pattern": ".", "weight_decay": 0.3}]))
        assert group == ([name for name, _ in SHAPES], 1.0, 0.3)

    def test_the_first_matching_pattern_counts(self) -> None:
        groups = [{"pattern": r"^encoder\.layer", "lr_scale": 0.1}, {"pattern": "encoder", "lr_scale": 0.2}]
        found = settings_of(config_with(groups=groups))
        assert (found["encoder.layer.weight"][0], found["encoder.norm.weight"][0]) == (0.1, 0.2)

    def test_a_pattern_without_its_own_decay_keeps_the_general_one(self) -> None:
        found = settings_of(config_with(weight_decay=0.3, groups=[{"pattern": "conv", "lr_scale": 0.0}]))
        assert found["conv.weight"] == (0.0, 0.3)

    @pytest.mark.parametrize("pattern", ["decoder", r"^layer", "Encoder"])
    def test_a_pattern_without_a_match_is_an_error_with_an_example_of_a_name(self, pattern: str) -> None:
        with pytest.raises(UserError) as caught:
            settings_of(config_with(groups=[{"pattern": "conv"}, {"pattern": pattern}]))
        assert str(caught.value).startswith(f"optim.groups.1.pattern={pattern!r}: finds no parameter")
        assert "encoder.layer.weight" in str(caught.value)

    def test_a_pattern_that_only_matches_parameters_of_an_earlier_one_is_an_error(self) -> None:
        with pytest.raises(UserError, match=r"optim\.groups\.1\.pattern"):
            settings_of(config_with(groups=[{"pattern": "encoder"}, {"pattern": r"encoder\.norm"}]))


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    parameters = dict(model.named_parameters())
    groups = parameter_groups([(name, parameter.shape) for name, parameter in parameters.items()], config)
    optimizer = make_adamw(parameters, groups, config)
    allocate_state(optimizer, parameters.values())
    return optimizer


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


class TestClipping:
    def test_it_equals_clip_grad_norm(self) -> None:
        ours, theirs = small_model(), small_model()
        optimizer, reference = (adamw(model, config_with(weight_decay=0.1)) for model in (ours, theirs))
        for step, max_norm in enumerate((0.5, 1e6, None), start=1):
            for model in (ours, theirs):
                model(torch.full((2, 5), 1.0 * step)).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
            assert 0.5 < norm < 1e6
            reference.step()
            clip_and_step(optimizer, norm, max_norm)
            optimizer.zero_grad()
            reference.zero_grad()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("max_norm", [None, 1.0])
    def test_a_norm_that_is_not_finite_changes_nothing(self, value: float, max_norm: float | None) -> None:
        """Not even if each gradient is finite, as 1e30 is."""
        model = small_model()
        optimizer = adamw(model, config_with(weight_decay=0.1))

        def everything() -> list[torch.Tensor]:
            states = [tensor for state in optimizer.state.values() for tensor in state.values()]
            return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]

        for gradient in (1.0, value):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            norm = nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
            before = everything()
            clip_and_step(optimizer, norm, max_norm)
        assert not norm.isfinite()
        assert all(map(torch.equal, before, everything()))


class TestOptimizer:
    def model(self) -> nn.Module:
        return small_model()

    def test_it_is_fused_and_has_its_state_before_the_first_step(self) -> None:
        model = self.model()
        optimizer = adamw(model, OptimConfig())
        assert all(group["fused"] for group in optimizer.param_groups)
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
            assert state["step"].item() == 0
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
            assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()

    def test_missing_state_is_an_error_and_is_not_created(self) -> None:
        model = self.model()
        optimizer = adamw(model, OptimConfig())
        assert set(state_of(optimizer, "0.weight", model[0].weight)) == {"step", "exp_avg", "exp_avg_sq"}
        other = nn.Parameter(model[0].weight.detach().clone())
        with pytest.raises(RuntimeError, match=r"0\.weight: the optimizer has no state"):
            state_of(optimizer, "0.weight", other)
        assert other not in optimizer.state

    def test_allocated_state_changes_no_step(self) -> None:
        plain, ours = self.model(), self.model()
        config = config_with(weight_decay=0.0)
        optimizers = [
            torch.optim.AdamW(
                plain.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
            ),
            adamw(ours, config),
        ]
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            for step in range(3):
                optimizer.zero_grad()
                model(torch.full((2, 5), 1.0 + step)).square().sum().backward()
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))

    def test_the_scheduled_rate_is_multiplied_by_the_scale_of_each_group(self) -> None:
        config = config_with(groups=[{"pattern": "^0", "lr_scale": 0.25}])
        optimizer = adamw(self.model(), config)
        set_learning_rate(optimizer, 0.01)
        assert {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups} == {(1.0, 0.01), (0.25, 0.0025)}
        set_learning_rate(optimizer, 0.02)
        assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.005}

    def test_steps_equal_adamw_by_its_formula_in_float64(self) -> None:
        """Loshchilov & Hutter 2019, algorithm 2, with decay on matrices only and a scaled group."""
        model = self.model()
        config = config_with(
            lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, groups=[{"pattern": "^2", "lr_scale": 0.5}]
        )
        optimizer = adamw(model, config)
        named = dict(model.named_parameters())
        expected = {name: p.detach().double().numpy().copy() for name, p in named.items()}
        first = {name: np.zeros_like(value) for name, value in expected.items()}
        second = {name: np.zeros_like(value) for name, value in expected.items()}
        generator = np.random.default_rng(0)
        for step, lr in enumerate((0.01, 0.02, 0.005, 0.02), start=1):
            set_learning_rate(optimizer, lr)
            for name, parameter in named.items():
                gradient = generator.standard_normal(parameter.shape)
                parameter.grad = torch.from_numpy(gradient).float()
                gradient = parameter.grad.double().numpy()
                scaled = lr * (0.5 if name.startswith("2") else 1.0)
                decay = 0.1 if parameter.ndim == 2 else 0.0
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.98 * second[name] + 0.02 * gradient**2
                corrected = first[name] / (1 - 0.9**step)
                root = np.sqrt(second[name] / (1 - 0.98**step))
                expected[name] -= scaled * decay * expected[name] + scaled * corrected / (root + 1e-6)
            optimizer.step()
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6)
