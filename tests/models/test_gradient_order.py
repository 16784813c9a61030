"""Gradients arrive in one order whatever a micro-batch is like: ZeRO-2 adds up what arrives together on the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise, make_inputs
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining


def order_of_arrival(lengths: list[int], *overrides: str, compute: torch.dtype, weights: torch.dtype) -> list[str]:
    config = load_config("base", [*MICRO_MODEL, *overrides]).model
    draws = np.random.default_rng(0)
    waveforms = [draws.standard_normal(length).astype(np.float32) for length in lengths]
    inputs = make_inputs(waveforms, list(range(len(lengths))), number=0, seed=0, config=config)
    batch = MicroBatch(0, 0, inputs, sum(lengths))
    model = Wav2Vec2ForPretraining(config, compute).to(weights)
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    noise = gumbel_noise([batch], seed=0, config=config, device=torch.device("cpu"))
    model(inputs, noise_MGV=noise).total.backward()
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
