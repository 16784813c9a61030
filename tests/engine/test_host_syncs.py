"""A window and a step ask a GPU for no value, so that the host runs ahead of it.

On the meta device, where nothing has a value, whatever needs one fails: `item`, `nonzero`, masks as indices, copies to
the host. The code is the GPU's: it asks whether a device is a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.batches import inputs_of
from tests.helpers.engines import set_up
from tests.helpers.micro import MICRO_ENCODER, MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.data.inputs import join, to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine import build_engine
from w2vscale.objectives import Objective, build_objective
from w2vscale.objectives.base import empty_model
from w2vscale.training.pending import HostCopy

META = torch.device("meta")


def micro_batch(objective: Objective, lengths: Sequence[int], number: int, targets: Any = None) -> MicroBatch:
    draws = np.random.default_rng(number)
    waveforms = [draws.standard_normal(length, dtype=np.float32) for length in lengths]
    return MicroBatch(number, inputs_of(objective, waveforms, targets, number=number), sum(lengths))


class CopiesToTheDevice(TorchDispatchMode):
    """Counts operations on tensors of the host beside those of the device: each would be a copy that is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" and x.dim() > 0 for x in given):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
@pytest.mark.parametrize("lengths", [[(16_000, 12_000), (9_000,)], [(16_000, 16_000)]], ids=["padded", "not padded"])
def test_forward_and_backward_need_no_value(preset: str, lengths: list[tuple[int, ...]]) -> None:
    objective = build_objective(load_config(preset, [*MICRO_MODEL, "precision.compute=bf16"]))
    model = empty_model(objective).train()
    batches = [micro_batch(objective, some, number) for number, some in enumerate(lengths)]
    inputs = join([to_device(batch.inputs, META) for batch in batches])
    codes = (objective.settings.codebooks, objective.settings.codebook_entries)
    noise_MGV = torch.empty((sum(batch.weight for batch in batches), *codes), device=META)
    with CopiesToTheDevice() as copies:
        sums = model(inputs, noise_MGV=noise_MGV, temperature=2.0, active=[True, False, True])
        (sums.total * (1.0 / torch.tensor(3.0))).backward()
    assert copies.found == []
    assert all(field.device.type == "meta" for field in sums)


@pytest.mark.parametrize("lengths", [(16_000, 12_000), (16_000, 16_000)], ids=["padded", "not padded"])
def test_fine_tuning_needs_no_value(lengths: tuple[int, ...]) -> None:
    """All but the loss of CTC itself, which PyTorch does not have on the meta device."""
    settings = ["objective.name=ctc", "objective.vocabulary=letters", "objective.channel_mask_probability=0.5"]
    objective = build_objective(load_config("base", [*MICRO_ENCODER, *settings, "precision.compute=bf16"]))
    model = empty_model(objective).train()
    inputs = to_device(micro_batch(objective, lengths, 0, [[5, 6], [7]]).inputs, META)
    audio = inputs.audio
    with CopiesToTheDevice() as copies:
        encoded = model.encoder(
            audio.waveforms_BS.to(torch.bfloat16), audio.lengths, audio.mask_BT, inputs.channel_mask_BD
        )
        model.head(encoded.context_BTD).sum().backward()
    assert copies.found == []


@pytest.mark.parametrize(("max_norm", "decay"), [(None, 0.0), (1.0, 0.999)])
def test_a_step_needs_no_value(max_norm: float | None, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It clips, updates the moving average, and skips both where the norm is not finite."""
    monkeypatch.setattr(clip_grad, "_device_has_foreach_support", lambda device: True)  # the meta device, too
    config = load_config("base", [*MICRO_MODEL, f"optim.ema_decay={decay}"])
    objective = build_objective(config)
    engine: Any = build_engine(empty_model(objective), config, objective, META)
    first, *others = engine.parameters.values()
    for parameter in others:  # the first one has no gradient, as if LayerDrop had skipped it
        parameter.grad = torch.empty_like(parameter)
    with CopiesToTheDevice() as copies:
        norm = engine.step(lr=1e-3, max_norm=max_norm)
    assert copies.found == []
    assert norm.device == META and norm.shape == ()
    assert first.grad is None


@pytest.mark.cuda
def test_updates_on_a_gpu_wait_for_nothing() -> None:
    config = load_config("base", [*MICRO_MODEL, "precision.compute=bf16", "optim.ema_decay=0.999"])
    setup = set_up(config, torch.device("cuda", torch.cuda.current_device()))
    window = [micro_batch(setup.objective, (16_000, 12_000), number).pin_memory() for number in range(2)]
    first = setup.window(window, 1.0)
    HostCopy(setup.step(0.0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = setup.window(window, 1.0)
        norm = HostCopy(setup.step(0.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(second.total) == pytest.approx(float(first.total), rel=1e-3)
    assert 0.0 < norm.read() < math.inf
