"""Gradients arrive in the same order for every micro-batch. ZeRO-2 needs this: it reduces them as they arrive."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.batches import inputs_of
from tests.helpers.families import noise
from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.objectives import StepContext, build_objective


def order_of_arrival(lengths: list[int], *overrides: str, compute: torch.dtype, weights: torch.dtype) -> list[str]:
    objective = build_objective(load_config("base", [*MICRO_MODEL, "regularization.layerdrop=0", *overrides]))
    model = objective.build_model().to(weights)
    model.compute_dtype = compute
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    step = StepContext(seed=0, update=0, numbers=(0,))
    objective.forward(model, inputs_of(objective, noise(*lengths)), step=step, training=True).total.backward()
    return arrived


@pytest.mark.parametrize("kernel", [128, 16], ids=["direct", "by frequency"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(
    ("compute", "weights"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_padded_unpadded_single_and_silent_micro_batches(
    norm: str, kernel: int, compute: torch.dtype, weights: torch.dtype
) -> None:
    overrides = (f"model.conv_norm={norm}", "model.conv_bias=true", f"model.positional_kernel={kernel}")
    unpadded = order_of_arrival([16_000, 16_000], *overrides, compute=compute, weights=weights)
    assert len(unpadded) == len(set(unpadded)) > 50
    for lengths in ([16_000, 12_000], [16_000], []):
        assert order_of_arrival(lengths, *overrides, compute=compute, weights=weights) == unpadded
